"""Every routed architecture, from training to the tools."""

import copy
import json
import math

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from support.architectures import (
    ARCHITECTURES,
    STEPS,
    a_step,
    decode_by_hand,
    encode_by_hand,
    every_architecture,
    random_sae,
    streams_of,
    training_config,
)
from support.pages import Page
from support.small import TINYLLAMA_WIDTH, small_config, tokens_dataset
from support.splice import brute_force, hooked_model

from sae_lens_route.dashboards import write_dashboard
from sae_lens_route.evals.evaluate import saelens_metrics
from sae_lens_route.saes.inference import to_inference
from sae_lens_route.splice import RouteSAETransformer, attach


@every_architecture
def test_trains(make_trained, tinyllama, architecture):
    sae, folder = make_trained(architecture)
    assert type(sae) is ARCHITECTURES[architecture][0]
    assert all(torch.isfinite(value).all() for value in sae.state_dict().values())
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == STEPS and log[-1]["loss"] < log[0]["loss"]

    torch.manual_seed(small_config(None).seed)  # as the runner does: what training started from
    start = type(sae)(training_config(architecture, d_in=TINYLLAMA_WIDTH, d_sae=96))
    start.normalize_decoder()
    held_out = torch.tensor(tokens_dataset(n_contexts=16, seed=1)["tokens"])
    x = streams_of(tinyllama, sae, held_out)[:, 2:-3].flatten(0, 1)
    with torch.no_grad():
        trained = copy.deepcopy(sae)  # batch top-k counts every pass into its threshold
        before, after = (float(s.training_forward_pass(a_step(x)).loss) for s in (start, trained))
    assert after < 0.95 * before
    for name, parameter in sae.named_parameters():
        moved = (parameter - dict(start.named_parameters())[name]).abs().max()
        # Adam goes about 2e-3 a step at most; b_dec starts at the mean of the first batch
        assert moved > 1e-3 and (moved < 0.12 or name == "b_dec"), name


@every_architecture
def test_is_saved_and_loaded_as_itself(make_trained, architecture):
    sae, folder = make_trained(architecture)
    loaded, converted = SAE.load_from_disk(folder), to_inference(sae)
    assert type(loaded) is type(converted) is ARCHITECTURES[architecture][2]
    as_written = json.loads(json.dumps(converted.cfg.to_dict()))  # tuples become lists
    assert loaded.cfg.to_dict() == as_written
    weights = loaded.state_dict()
    assert weights.keys() == converted.state_dict().keys() > {"W_router", "W_enc", "W_dec", "b_dec"}
    for name, value in converted.state_dict().items():
        assert torch.equal(value, weights[name]), name
    torch.testing.assert_close(loaded.W_dec.norm(dim=-1), torch.ones(96))
    loaded.fold_W_dec_norm()  # SAEDashboard and SAELens call it: nothing is left to fold
    assert torch.equal(loaded.W_dec, converted.W_dec)

    cfg = json.loads((folder / "cfg.json").read_text())
    assert cfg["architecture"] == loaded.cfg.architecture()
    assert cfg["architecture"] == {
        "batchtopk": "route_jumprelu",
        "matryoshka_batchtopk": "route_jumprelu",
    }.get(architecture, f"route_{architecture}")
    assert (cfg["n_routed_layers"], cfg["routing"], cfg["aggregation"]) == (9, "hard", "sum")
    assert cfg["metadata"]["hook_name"] == "blocks.11.route.hook_resid_post"
    assert cfg["metadata"]["hook_names"] == [f"blocks.{i}.hook_resid_post" for i in range(3, 12)]

    x = torch.randn(20, 9, TINYLLAMA_WIDTH, generator=torch.Generator().manual_seed(0))
    x_route = loaded.route(x).x_route
    assert torch.equal(x_route, sae.route(x).x_route)
    acts = encode_by_hand(loaded, x_route)
    torch.testing.assert_close(loaded.encode(x_route), acts, rtol=1e-5, atol=1e-6)
    expected = decode_by_hand(loaded, acts)
    torch.testing.assert_close(loaded(x_route), expected, rtol=1e-4, atol=1e-5)


@every_architecture
def test_saelens_evaluation_is_finite(make_trained, tinyllama, architecture):
    sae = SAE.load_from_disk(make_trained(architecture)[1])
    metrics = saelens_metrics(tinyllama, sae, tokens_dataset(16), max_tokens=128, batch_size=4)
    never_fired = [density == 0 for density in metrics["featurewise"]["feature_density"]]
    assert len(never_fired) == 96 and not all(never_fired)
    names = set()
    for group in metrics.values():
        for name, value in group.items():
            names.add(name)
            values = value if isinstance(value, list) else [value]
            # how often a feature fires in a prompt where it fires: 0 / 0 if in none
            unknown = never_fired if name == "consistent_activation_heuristic" else [False] * 96
            for v, may_be_nan in zip(values, unknown, strict=False):
                assert math.isfinite(v) != may_be_nan, name
    assert names > {"kl_div_with_sae", "ce_loss_score", "explained_variance", "l0", "mse"}
    assert 0 < metrics["sparsity"]["l0"] <= 96


@every_architecture
def test_splice_against_brute_force(architecture):
    routed = [1, 2, 4, 5]
    model = hooked_model("llama", RouteSAETransformer)
    d = model.cfg.d_model
    sae = to_inference(random_sae(architecture, d, 4 * d, n_layers=4, spread=0.5))
    sae.requires_grad_(False)
    name, names = "blocks.5.route.hook_resid_post", [f"blocks.{b}.hook_resid_post" for b in routed]
    sae.cfg.metadata = SAEMetadata(hook_name=name, hook_names=names)
    tokens = torch.randint(2, 512, (2, 9), generator=torch.Generator().manual_seed(0))

    def reconstruct(value):
        return decode_by_hand(sae, encode_by_hand(sae, value))

    with torch.no_grad():
        clean = model(tokens)
        expected, chosen, met = brute_force(model, sae, routed, reconstruct, lambda: model(tokens))
        assert len(chosen.unique()) > 2 and (expected - clean).abs().max() > 0.1
        logits, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
        assert (logits - expected).abs().max() <= 1e-9
        acts = cache[f"{name}.hook_sae_acts_post"]
        assert (acts - encode_by_hand(sae, met)).abs().max() <= 1e-9
        with_error = model.run_with_saes(tokens, saes=[sae], use_error_term=True)
        assert (with_error - clean).abs().max() <= 1e-9
        with attach(model, sae) as hook:
            assert torch.equal(model(tokens), clean)
            assert torch.equal(hook.routing.route, chosen)


@every_architecture
def test_our_dashboard(make_trained, tinyllama, architecture, tmp_path):
    sae = SAE.load_from_disk(make_trained(architecture)[1])
    tokens = torch.tensor(tokens_dataset(8, 24)["tokens"])
    path = write_dashboard(tinyllama, sae, tokens, tmp_path / "page.html", n_features=4)
    data = Page(path.read_text(encoding="utf-8")).data
    with torch.no_grad():
        routing = sae.route(streams_of(tinyllama, sae, tokens))
        acts = encode_by_hand(sae, routing.x_route) / routing.weight.unsqueeze(-1)
    special = torch.isin(tokens, torch.tensor(tinyllama.tokenizer.all_special_ids))
    maxima = acts.masked_fill(special.unsqueeze(-1), 0).amax((0, 1))
    assert data["architecture"] == sae.cfg.architecture() and len(data["features"]) == 4
    for feature in data["features"]:
        assert feature["max_activation"] == pytest.approx(
            float(maxima[feature["feature"]]), rel=1e-4
        )
    assert len({feature["feature"] for feature in data["features"]}) == 4
