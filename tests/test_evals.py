"""Metrics against brute force, the reference's numbers, and SAELens's own evaluation."""

import functools
import math

import pytest
import torch
from golden_numbers import golden_sae, load
from sae_lens import SAE
from small import TINYLLAMA, small_config, tokens_dataset

from sae_lens_route.activations import RoutedActivationsStore
from sae_lens_route.baselines import TopKCrosscoder, TopKCrosscoderConfig
from sae_lens_route.evals import (
    CrosscoderMetrics,
    downstream_metrics,
    evaluate,
    evaluate_all,
    reconstruction_metrics,
    saelens_metrics,
)
from sae_lens_route.models import load_model, residual_hook_names
from sae_lens_route.runner import RouteSAETrainingRunner
from sae_lens_route.splice import attach


class NoReLUTopK(torch.nn.Module):
    """The reference keeps negative latents; SAELens's TopK cuts them."""

    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, x):
        top = x.topk(self.k, dim=-1)
        return torch.zeros_like(x).scatter(-1, top.indices, top.values)


def lm_golden(seed):
    tensors, info = load(f"seed{seed}_lm")
    model = load_model(TINYLLAMA, "AutoModelForCausalLM")
    # the reference counts padding too, so what padding attends to matters: give the mask it gave
    mask = tensors["attention_mask"]
    model.model.forward = functools.partial(model.model.forward, attention_mask=mask)
    sae = golden_sae(tensors, info, aggregation=info["aggre"], routing=info["routing"])
    sae.activation_fn = NoReLUTopK(info["k"])
    sae.cfg.metadata.hook_name = "blocks.11.hook_resid_route"
    sae.cfg.metadata.hook_names = residual_hook_names(model, list(range(3, 12)))
    return model, sae, tensors, info


@pytest.mark.parametrize("seed", [0, 1])
def test_the_references_evaluation(seed):
    """KL, delta CE and the parts of loss recovered, every position counted, p left out."""
    model, sae, tensors, info = lm_golden(seed)
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


@pytest.mark.parametrize("seed", [0, 1])
def test_the_references_norm_mse(seed):
    _, sae, tensors, info = lm_golden(seed)
    x = tensors["hidden_states_blocks3_11"].flatten(0, 1)
    result = reconstruction_metrics(sae, [x])
    assert result.norm_mse == pytest.approx(info["reference_metrics"]["NormMSE"], rel=5e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "sae"
    runner = RouteSAETrainingRunner(small_config(folder, training_tokens=64 * 30))
    runner.run()
    return runner.model, SAE.load_from_disk(folder)


def test_reconstruction_against_brute_force(trained):
    """Token by token, layer by layer, and split into batches in another way."""
    _, sae = trained
    x = torch.randn(40, 9, 64, generator=torch.Generator().manual_seed(0))
    result = reconstruction_metrics(sae, x.split(7))
    routed, table, tokens = [], [], []
    for token in x:
        r = sae.route(token)
        n = [(h - h.mean()) / (h.std() + 1e-6) for h in token]
        row = []
        for i in range(9):
            target = r.weight * n[i]
            row.append(float(((target - sae(target)) ** 2).sum() / (target**2).sum()))
        table.append(row)
        routed.append(row[int(r.layer)])
        tokens.append(int(r.layer))
    table = torch.tensor(table)
    share = torch.bincount(torch.tensor(tokens), minlength=9) / 40
    assert result.n_tokens == 40
    assert result.norm_mse == pytest.approx(sum(routed) / 40, rel=1e-4)
    assert result.share == pytest.approx(share.tolist())
    assert result.norm_mse_fixed_layer == pytest.approx(table.mean(0).tolist(), rel=1e-4)
    assert result.norm_mse_uniform == pytest.approx(float(table.mean()), rel=1e-4)
    assert result.norm_mse_matched == pytest.approx(float(share @ table.mean(0)), rel=1e-4)
    assert result.norm_mse_best == pytest.approx(float(table.min(1).values.mean()), rel=1e-4)
    assert result.regret == pytest.approx(result.norm_mse - result.norm_mse_best, abs=1e-6)
    assert 0 <= result.load_entropy <= math.log(9)
    for i in range(9):
        here = [e for e, layer in zip(routed, tokens, strict=True) if layer == i]
        if here:
            assert result.norm_mse_by_layer[i] == pytest.approx(sum(here) / len(here), rel=1e-4)
        else:
            assert result.norm_mse_by_layer[i] is None


def test_a_perfect_sae_costs_nothing_and_an_untrained_one_does(trained):
    """The published splice edited nothing under some versions of transformers: KL was 0.0000."""
    model, sae = trained
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


def test_excluded_tokens_are_neither_spliced_nor_counted(trained):
    model, sae = trained
    tokens = torch.randint(2, 512, (1, 12))
    kept = torch.zeros_like(tokens, dtype=torch.bool)
    kept[0, 5] = True
    result = downstream_metrics(model, sae, [(tokens, kept)])
    assert result.n_tokens == 1

    clean = model(tokens).log_softmax(-1)
    _, cache = model.run_with_cache(tokens)
    streams = torch.stack([cache[n] for n in sae.cfg.metadata.hook_names], dim=2)
    routing = sae.route(streams)
    block = 3 + int(routing.layer[0, 5])
    x = streams[0, 5, routing.layer[0, 5]]
    p = routing.weight[0, 5]
    x_hat = sae(p * (x - x.mean()) / (x.std() + 1e-6)) / p * (x.std() + 1e-6) + x.mean()

    def put(stream, hook):
        stream[0, 5] = x_hat
        return stream

    edited = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{block}.hook_resid_post", put)])
    kl = (clean.exp() * (clean - edited.log_softmax(-1))).sum(-1)[0, 5]
    assert result.kl == pytest.approx(float(kl), rel=1e-3)


def test_saelens_own_evaluation_runs_and_agrees(trained):
    model, sae = trained
    # SAELens reads on for its second half; a text of just this length starts again there
    text = {"max_tokens": 512, "batch_size": 4}
    ours = evaluate(model, sae, tokens_dataset(32), **text)
    theirs = saelens_metrics(model, sae, tokens_dataset(32), **text)
    for group in theirs.values():
        for name, value in group.items():
            values = value if isinstance(value, list) else [value]
            assert all(math.isfinite(v) for v in values), name
    # the same tokens and the same splice, by two programs
    assert theirs["model_behavior_preservation"]["kl_div_with_sae"] == pytest.approx(
        ours.downstream.kl, rel=1e-3
    )
    assert theirs["reconstruction_quality"]["explained_variance"] == pytest.approx(
        ours.reconstruction.explained_variance, rel=1e-3
    )
    assert theirs["sparsity"]["l0"] == pytest.approx(ours.reconstruction.l0, rel=1e-4)


# --- crosscoders, and many at once ---------------------------------------------------------------


@pytest.fixture(scope="module")
def crosscoder(trained):
    """A crosscoder of random weights over blocks 3, 4 and 6."""
    metadata = trained[1].cfg.metadata
    torch.manual_seed(5)
    sae = TopKCrosscoder(TopKCrosscoderConfig(d_in=3 * 64, d_sae=128, k=8, n_routed_layers=3))
    for weight in (sae.W_enc, sae.W_dec):
        torch.nn.init.normal_(weight, std=192**-0.5)
    torch.nn.init.normal_(sae.b_dec, std=0.1)
    sae.cfg.metadata = type(metadata)(**metadata.to_dict())
    sae.cfg.metadata.routed_layers = [3, 4, 6]
    sae.cfg.metadata.hook_names = [f"blocks.{i}.hook_resid_post" for i in (3, 4, 6)]
    sae.cfg.metadata.hook_name = "blocks.6.hook_resid_stack"
    return sae


def standardized(x):
    return (x - x.mean()) / (x.std() + 1e-6)


@torch.no_grad()
def test_a_crosscoders_metrics_against_brute_force(trained, crosscoder):
    """Token by token: NormMSE per layer, L0, and KL through a forward pass that is written out."""
    model = trained[0]
    size = {"max_tokens": 64, "batch_size": 4}
    result = evaluate(model, crosscoder, tokens_dataset(8), **size)
    rebuilt, downstream = result.reconstruction, result.downstream
    assert isinstance(rebuilt, CrosscoderMetrics) and downstream is not None
    assert result.downstream_unscaled is None and downstream.route_agreement is None

    text = RoutedActivationsStore.from_sae(model, crosscoder, tokens_dataset(8))
    (tokens,) = text.token_batches(64)
    special = torch.tensor([0, 1])  # BOS and padding of the tiny Llama
    kept = ~torch.isin(tokens, special)
    assert 0 < (~kept).sum() < kept.numel()
    _, cache = model.run_with_cache(tokens)
    streams = {i: cache[f"blocks.{i}.hook_resid_post"].clone() for i in (3, 4, 6)}
    replaced = {i: stream.clone() for i, stream in streams.items()}
    errors, active, squared, stacks = {3: [], 4: [], 6: []}, [], [], []
    for row, at in kept.nonzero().tolist():
        n = {i: standardized(stream[row, at]) for i, stream in streams.items()}
        h = torch.cat(list(n.values()))
        pre = (h - crosscoder.b_dec * crosscoder.cfg.apply_b_dec_to_input) @ crosscoder.W_enc
        pre = (pre + crosscoder.b_enc).relu()
        z = torch.where(pre >= pre.topk(8).values[-1], pre, 0)
        h_hat = z @ crosscoder.W_dec + crosscoder.b_dec
        active.append(int((z > 0).sum()))
        stacks.append(h)
        squared.append(float((h - h_hat).pow(2).sum()))
        for i, part in zip(n, h_hat.split(64), strict=True):
            errors[i].append(float((n[i] - part).pow(2).sum() / n[i].pow(2).sum()))
            x = streams[i][row, at]
            replaced[i][row, at] = part * (x.std() + 1e-6) + x.mean()
    by_layer = [sum(errors[i]) / len(errors[i]) for i in (3, 4, 6)]
    assert rebuilt.n_tokens == len(active) == downstream.n_tokens
    assert rebuilt.norm_mse_by_layer == pytest.approx(by_layer, rel=1e-4)
    assert rebuilt.norm_mse == pytest.approx(sum(by_layer) / 3, rel=1e-4)
    assert rebuilt.l0 == pytest.approx(sum(active) / len(active), rel=1e-6)
    h = torch.stack(stacks)
    variance = float((h - h.mean(0)).pow(2).sum())
    assert rebuilt.explained_variance == pytest.approx(1 - sum(squared) / variance, rel=1e-4)

    hooks = [
        (f"blocks.{i}.hook_resid_post", lambda _x, hook, new=new: new)
        for i, new in replaced.items()
    ]
    clean = model(tokens).log_softmax(-1)
    spliced = model.run_with_hooks(tokens, fwd_hooks=hooks).log_softmax(-1)
    kl = (clean.exp() * (clean - spliced)).sum(-1)[kept]
    assert downstream.kl == pytest.approx(float(kl.mean()), rel=1e-3)
    # every kept token is written to in every layer
    assert downstream.kl_by_layer == pytest.approx([downstream.kl] * 3)
    targets = tokens[:, 1:, None]
    ce = -spliced[:, :-1].gather(-1, targets).squeeze(-1)[kept[:, 1:]].mean()
    assert downstream.ce_spliced == pytest.approx(float(ce), rel=1e-4)
    assert not any(module._forward_hooks for module in model.blocks)


def test_dead_features_of_a_crosscoder_are_those_no_token_fires(trained, crosscoder):
    model = trained[0]
    (result,) = evaluate_all(
        model, {"x": crosscoder}, tokens_dataset(8), max_tokens=64, batch_size=4
    ).values()
    text = RoutedActivationsStore.from_sae(model, crosscoder, tokens_dataset(8))
    (x,) = text.activation_batches(64)
    fired = (crosscoder.encode_layers(x) > 0).any(0)
    assert result.reconstruction.dead_features == int((~fired).sum()) > 0


def assert_close(a, b):
    """Metrics of two evaluations, to 1e-12; what is null in one is null in the other."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_close(x, y)
    else:
        assert a == b or a == pytest.approx(b, rel=1e-12, abs=1e-12)


def test_many_are_evaluated_with_one_reading_of_the_text(trained, crosscoder):
    """Whatever the company: alone, in another order, and over blocks that others do not read."""
    model, sae = trained
    size = {"max_tokens": 128, "batch_size": 4}
    alone = {
        "sae": evaluate(model, sae, tokens_dataset(8), **size).to_dict(),
        "crosscoder": evaluate(model, crosscoder, tokens_dataset(8), **size).to_dict(),
    }
    for saes in (
        {"sae": sae, "crosscoder": crosscoder},
        {"crosscoder": crosscoder, "sae": sae},
    ):
        together = evaluate_all(model, saes, tokens_dataset(8), unscaled=True, **size)
        for name, expected in alone.items():
            assert_close(together[name].to_dict(), expected)
    without = evaluate_all(model, {"sae": sae}, tokens_dataset(8), **size)["sae"]
    assert without.downstream_unscaled is None
    assert_close(without.downstream._asdict(), alone["sae"]["downstream"])


def test_saes_that_read_text_differently_are_refused(trained, crosscoder):
    model, sae = trained
    other = SAE.from_dict(sae.cfg.to_dict())
    other.cfg.metadata.context_size = 8
    with pytest.raises(ValueError, match=r"read text differently .*context_size"):
        evaluate_all(model, {"a": crosscoder, "b": other}, tokens_dataset(8), max_tokens=64)
