"""What one pass collects, against a plain forward pass and the rule of excluded tokens."""

import numpy as np
import pytest
import torch
from sae_lens.analysis.compat import has_transformer_bridge
from support.pages import BLOCKS, routed_sae
from support.small import TINYLLAMA, tokens_dataset

from sae_lens_route.dashboards.collect import collect, route_text
from sae_lens_route.data.kept_tokens import KeptTokens
from sae_lens_route.errors import UserError
from sae_lens_route.models.load import load_model


def test_activations_are_those_of_a_plain_forward_pass(model, sae, tokens, expected):
    seen = collect(model, sae, tokens)
    acts = expected.acts.reshape(-1, sae.cfg.d_sae)
    for feature in range(sae.cfg.d_sae):
        token, value = seen.activations(feature)
        assert token.tolist() == np.flatnonzero(acts[:, feature] > 0).tolist()
        assert value == pytest.approx(acts[token, feature], rel=1e-5)
    assert seen.tokens.route.tolist() == expected.route.ravel().tolist()
    assert seen.tokens.weight == pytest.approx(expected.weight.ravel(), rel=1e-5)
    assert seen.mean_probs == pytest.approx(expected.probs[expected.kept].mean(0), rel=1e-5)
    n_pos = tokens.shape[1]
    places = seen.tokens.sequence * n_pos + seen.tokens.position
    assert places.tolist() == list(range(tokens.numel()))
    assert seen.tokens.id.tolist() == tokens.flatten().tolist()


@pytest.mark.parametrize("exclude_special_tokens", [True, False, [7, 0, 200]])
@pytest.mark.parametrize("seqpos_slice", [(None,), (1, 12), (3, None)])
def test_tokens_are_excluded_as_in_training(model, tokens, exclude_special_tokens, seqpos_slice):
    sae = routed_sae(model)
    sae.cfg.metadata.exclude_special_tokens = exclude_special_tokens
    sae.cfg.metadata.seqpos_slice = seqpos_slice
    kept = KeptTokens.of(sae, model.tokenizer).mask(tokens).flatten().numpy()
    assert 0 < kept.sum() < kept.size or (exclude_special_tokens, seqpos_slice) == (False, (None,))

    seen = collect(model, sae, tokens)
    assert np.array_equal(seen.tokens.kept, kept)
    # every token has k active features, so that a token without any is excluded
    assert np.array_equal(np.unique(seen.active.token), np.flatnonzero(kept))


def test_selected_features_alone_are_collected(model, sae, tokens):
    everything, some = collect(model, sae, tokens), collect(model, sae, tokens, features=[9, 5, 9])
    assert set(some.active.feature) == {5, 9}
    for feature in (5, 9):
        for mine, theirs in zip(
            some.activations(feature), everything.activations(feature), strict=True
        ):
            assert np.array_equal(mine, theirs)


def test_a_dataset_and_its_token_ids_are_read_equally(model, sae):
    dataset = tokens_dataset(6, 48)
    ids = torch.tensor(dataset["tokens"])
    of_dataset = collect(model, sae, dataset, max_tokens=6 * 48)
    # SAELens's store packs contexts again, so the same ids may be cut at other places
    of_ids = collect(model, sae, torch.tensor(of_dataset.tokens.id.reshape(-1, 48)))
    assert len(of_dataset.tokens.id) == ids.numel()
    for mine, theirs in zip(of_dataset.tokens, of_ids.tokens, strict=True):
        assert np.array_equal(mine, theirs)
    for mine, theirs in zip(of_dataset.active, of_ids.active, strict=True):
        assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("model_class", ["TransformerBridge", "AutoModelForCausalLM"])
def test_other_kinds_of_model(model, sae, tokens, expected, model_class):
    if model_class == "TransformerBridge" and not has_transformer_bridge():
        pytest.skip("this transformer-lens has no TransformerBridge")
    other = load_model(TINYLLAMA, model_class)
    its_sae = routed_sae(other)
    its_sae.load_state_dict(sae.state_dict())
    assert its_sae.cfg.metadata.hook_names != sae.cfg.metadata.hook_names
    seen = collect(other, its_sae, tokens[:4])
    assert seen.tokens.route.tolist() == expected.route[:4].ravel().tolist()
    acts = expected.acts[:4].reshape(-1, sae.cfg.d_sae)
    shown = acts[seen.active.token, seen.active.feature]
    assert len(shown) == (acts > 0).sum()
    assert seen.active.value == pytest.approx(shown, rel=1e-4)


def test_a_text_is_routed_with_bos_and_cut_to_the_context(model, sae):
    text = "The cat sat on the mat < and went home."
    ids = model.to_tokens(text)
    with torch.no_grad():
        _, cache = model.run_with_cache(ids)
        streams = torch.stack([cache[f"blocks.{i}.hook_resid_post"] for i in BLOCKS], dim=2)
        routing = sae.route(streams)
    routed = route_text(model, sae, text)
    assert routed.ids.tolist() == ids[0].tolist()
    assert routed.probs == pytest.approx(routing.probs[0].numpy(), abs=1e-6)
    assert routed.route.tolist() == routing.route[0].tolist()
    assert len(route_text(model, sae, 20 * text).ids) == sae.cfg.metadata.context_size


def test_unusable_requests_are_user_errors(model, sae, tokens):
    with pytest.raises(UserError, match="features 0 to 95"):
        collect(model, sae, tokens, features=[96])
    with pytest.raises(UserError, match="at least one"):
        collect(model, sae, tokens, features=[])
    with pytest.raises(UserError, match=r"no tokens to show.*exclude_special_tokens=True"):
        collect(model, sae, torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(UserError, match="has no tokens"):
        without_bos = routed_sae(model)
        without_bos.cfg.metadata.prepend_bos = False
        route_text(model, without_bos, "")
