"""Effects on the model's predictions against the reference's numbers and splices by hand."""

import pytest
import torch

from sae_lens_route.errors import UserError
from sae_lens_route.evals.downstream import downstream_metrics
from sae_lens_route.saes import RouteTopKSAE, RouteTopKSAEConfig
from sae_lens_route.splice import attach

pytestmark = pytest.mark.usefixtures("no_gradients")


def test_the_references_evaluation(lm_golden):
    """KL, delta CE and the parts of loss recovered, every position counted, p left out."""
    model, sae, tensors, info = lm_golden
    tokens = tensors["input_ids"]
    everything = torch.ones_like(tokens, dtype=torch.bool)
    result = downstream_metrics(model, sae, [(tokens, everything)], unscaled=True)
    expected, parts = info["reference_metrics"], info["components_float64_from_reference_logits"]
    per_sequence = result.kl * result.n_tokens / len(tokens)
    assert per_sequence == pytest.approx(expected["KLDiv"], rel=5e-4)
    assert result.ce_clean == pytest.approx(parts["ce_original"], rel=5e-4)
    assert result.ce_spliced == pytest.approx(parts["ce_reconstruct"], rel=5e-4)
    assert result.ce_ablated == pytest.approx(parts["ce_zero"], rel=5e-4)
    # a difference of two cross-entropies of 8 nats each: relative to those
    assert result.delta_ce == pytest.approx(expected["DeltaCE"], abs=5e-4 * 8)

    # the same splice, counted at real tokens only
    with attach(model, sae, unscaled=True) as hook:
        spliced = model.run_with_hooks(tokens, fwd_hooks=[(hook.name, lambda x, hook: sae(x))])
    clean = model(tokens).log_softmax(-1)
    kl = (clean.exp() * (clean - spliced.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(kl, tensors["derived.kl_per_token"], rtol=5e-4, atol=5e-4)


def test_a_perfect_sae_costs_nothing_and_an_untrained_one_does(tinyllama, route_sae):
    """A splice that edits nothing (as the published one under some versions of transformers) would
    have a KL of 0."""
    model, sae = tinyllama, route_sae
    tokens = torch.randint(2, 512, (2, 16))
    kept = torch.ones_like(tokens, dtype=torch.bool)
    result = downstream_metrics(model, sae, [(tokens, kept)])
    assert result.kl > 1e-3
    nothing = downstream_metrics(model, sae, [(tokens, kept & (tokens < 0)), (tokens, kept)])
    assert nothing.kl == pytest.approx(result.kl, rel=1e-5)

    class Identity(type(sae)):
        def encode(self, x):
            return x

        def decode(self, feature_acts):
            return feature_acts

    perfect = Identity(sae.cfg)
    perfect.load_state_dict(sae.state_dict())
    exact = downstream_metrics(model, perfect, [(tokens, kept)])
    assert (exact.kl, exact.delta_ce, exact.route_agreement) == (0, 0, 1)


def test_excluded_tokens_are_neither_spliced_nor_counted(tinyllama, route_sae):
    model, sae = tinyllama, route_sae
    tokens = torch.randint(2, 512, (1, 12))
    kept = torch.zeros_like(tokens, dtype=torch.bool)
    kept[0, 5] = True
    result = downstream_metrics(model, sae, [(tokens, kept)])
    assert result.n_tokens == 1

    clean = model(tokens).log_softmax(-1)
    _, cache = model.run_with_cache(tokens)
    streams = torch.stack([cache[n] for n in sae.cfg.metadata.hook_names], dim=2)
    routing = sae.route(streams)
    block = 3 + int(routing.route[0, 5])
    x = streams[0, 5, routing.route[0, 5]]
    p = routing.weight[0, 5]
    x_hat = sae(p * (x - x.mean()) / (x.std() + 1e-6)) / p * (x.std() + 1e-6) + x.mean()

    def replace(stream, hook):
        stream[0, 5] = x_hat
        return stream

    edited = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{block}.hook_resid_post", replace)])
    kl = (clean.exp() * (clean - edited.log_softmax(-1))).sum(-1)[0, 5]
    assert result.kl == pytest.approx(float(kl), rel=1e-3)
    others = dict.fromkeys(set(range(3, 12)) - {block})
    assert result.kl_by_block == {**others, block: result.kl}


def test_soft_routing_has_no_block_to_splice_at(tinyllama):
    sae = RouteTopKSAE(RouteTopKSAEConfig(d_in=64, d_sae=96, k=8, routing="soft"))
    with pytest.raises(UserError, match="routing='soft' mixes the blocks"):
        downstream_metrics(tinyllama, sae, [])
