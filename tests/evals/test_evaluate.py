"""Evaluations of whole SAEs: which tokens count, many SAEs at once, SAELens's own metrics."""

import copy
import json
import math

import pytest
import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from support.numbers import assert_close
from support.small import small_config, tokens_dataset

from sae_lens_route.errors import UserError
from sae_lens_route.evals.evaluate import Evaluation, evaluate, evaluate_all, saelens_metrics
from sae_lens_route.evals.reconstruction import CrosscoderMetrics
from sae_lens_route.training.runner import RouteSAETrainingRunner


def test_saelens_own_evaluation_runs_and_agrees(tinyllama, route_sae):
    model, sae = tinyllama, route_sae
    # SAELens reads on for its second pass, which starts again at the end of a text of this length
    text = {"max_tokens": 512, "batch_size": 4}
    ours = evaluate(model, sae, tokens_dataset(32), **text)
    theirs = saelens_metrics(model, sae, tokens_dataset(32), **text)
    for group in theirs.values():
        for name, value in group.items():
            values = value if isinstance(value, list) else [value]
            assert all(math.isfinite(v) for v in values), name
    # the same tokens and the same splice, computed by two programs
    assert theirs["model_behavior_preservation"]["kl_div_with_sae"] == pytest.approx(
        ours.downstream.kl, rel=1e-3
    )
    assert theirs["reconstruction_quality"]["explained_variance"] == pytest.approx(
        ours.reconstruction.explained_variance, rel=1e-3
    )
    assert theirs["sparsity"]["l0"] == pytest.approx(ours.reconstruction.l0, rel=1e-4)


def standardized(x):
    return (x - x.mean()) / (x.std() + 1e-6)


@torch.no_grad()
def test_a_crosscoders_metrics_against_brute_force(tinyllama, crosscoder):
    """Token by token: NormMSE per block, L0, and KL through a forward pass that is written out."""
    model = tinyllama
    size = {"max_tokens": 64, "batch_size": 4}
    result = evaluate(model, crosscoder, tokens_dataset(8), **size)
    rebuilt, downstream = result.reconstruction, result.downstream
    assert isinstance(rebuilt, CrosscoderMetrics) and downstream is not None
    assert result.downstream_unscaled is None and downstream.route_agreement is None

    tokens = torch.tensor(tokens_dataset(8)["tokens"][:4])
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
    by_block = {i: sum(errors[i]) / len(errors[i]) for i in (3, 4, 6)}
    assert rebuilt.n_tokens == len(active) == downstream.n_tokens
    assert rebuilt.norm_mse_by_block == pytest.approx(by_block, rel=1e-4)
    assert rebuilt.norm_mse == pytest.approx(sum(by_block.values()) / 3, rel=1e-4)
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
    # every kept token is written to at every block
    assert downstream.kl_by_block == pytest.approx(dict.fromkeys((3, 4, 6), downstream.kl))
    targets = tokens[:, 1:, None]
    ce = -spliced[:, :-1].gather(-1, targets).squeeze(-1)[kept[:, 1:]].mean()
    assert downstream.ce_spliced == pytest.approx(float(ce), rel=1e-4)
    assert not any(module._forward_hooks for module in model.blocks)


def test_many_are_evaluated_with_one_reading_of_the_text(tinyllama, route_sae, crosscoder):
    """Results are those of each alone, in any order, and over blocks that others do not read."""
    model, sae = tinyllama, route_sae
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
    rebuilt = evaluate_all(model, {"sae": sae}, tokens_dataset(8), splice=False, **size)["sae"]
    assert rebuilt.downstream is rebuilt.downstream_unscaled is rebuilt.by_context.kl is None
    assert_close(rebuilt.reconstruction._asdict(), alone["sae"]["reconstruction"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("context_size", 8),
        ("prepend_bos", False),
        ("exclude_special_tokens", [7]),
        ("seqpos_slice", (1, 12)),
    ],
)
def test_saes_that_read_text_differently_are_refused(
    tinyllama, route_sae, crosscoder, field, value
):
    other = SAE.from_dict(route_sae.cfg.to_dict())
    setattr(other.cfg.metadata, field, value)
    saes = {"a": crosscoder, "b": other}
    with pytest.raises(UserError, match=rf"read text differently.*{field}"):
        evaluate_all(tinyllama, saes, tokens_dataset(8), max_tokens=64)


def test_an_sae_that_reads_one_hook_is_refused(tinyllama):
    plain = TopKSAE(TopKSAEConfig(d_in=64, d_sae=96, k=8))
    with pytest.raises(UserError, match="a TopKSAE is neither a RouteSAE nor a crosscoder"):
        evaluate(tinyllama, plain, tokens_dataset(8))


def test_results_survive_json(tinyllama, route_sae, crosscoder):
    for sae in (route_sae, crosscoder):
        result = evaluate(tinyllama, sae, tokens_dataset(8), max_tokens=64, batch_size=4)
        assert Evaluation.from_dict(json.loads(json.dumps(result.to_dict()))) == result


# --- which tokens count --------------------------------------------------------------------------


def expected_by_hand(model, sae, tokens, kept):
    """Number of tokens and mean NormMSE over the kept ones, from a plain forward pass."""
    _, cache = model.run_with_cache(tokens)
    streams = torch.stack([cache[name] for name in sae.cfg.metadata.hook_names], dim=2)
    x_route = sae.route(streams[kept]).x_route
    error = (x_route - sae(x_route)).pow(2).sum(-1) / x_route.pow(2).sum(-1)
    return int(kept.sum()), float(error.mean())


def check(model, sae, kept):
    tokens = torch.tensor(tokens_dataset(8)["tokens"])
    n_tokens, error = expected_by_hand(model, sae, tokens, kept)
    result = evaluate(model, sae, tokens_dataset(8), max_tokens=8 * 16, batch_size=3)
    assert result.reconstruction.n_tokens == result.downstream.n_tokens == n_tokens
    assert result.reconstruction.norm_mse == pytest.approx(error, rel=1e-4)


def test_positions_left_out_of_training_are_left_out_of_evaluation(tinyllama, tmp_path):
    cfg = small_config(tmp_path / "sae", seqpos_slice=(1, 12))
    RouteSAETrainingRunner(cfg, tokens_dataset(64), tinyllama).run()
    tokens = torch.tensor(tokens_dataset(8)["tokens"])
    kept = tokens > 1
    kept[:, 12:] = False
    with torch.no_grad():
        check(tinyllama, SAE.load_from_disk(tmp_path / "sae"), kept)


@torch.no_grad()
@pytest.mark.parametrize("excluded", [True, False, [0], [2, 3, 4, 5]])
def test_excluded_tokens_are_those_of_the_metadata(tinyllama, route_sae, excluded):
    sae = copy.deepcopy(route_sae)
    sae.cfg.metadata.exclude_special_tokens = excluded
    ids = {True: [0, 1], False: []}.get(excluded) if isinstance(excluded, bool) else excluded
    tokens = torch.tensor(tokens_dataset(8)["tokens"])
    check(tinyllama, sae, ~torch.isin(tokens, torch.tensor(ids)))
