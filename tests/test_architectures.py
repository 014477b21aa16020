"""One suite that every routed architecture passes, and the numerics of their training losses."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from sae_lens import SAE, AbsTopKTrainingSAE, AbsTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from small import TINYLLAMA, TINYLLAMA_WIDTH, small_config, tokens_dataset
from test_dashboards import Page
from test_splice import brute_force, hooked_model

from sae_lens_route import saes
from sae_lens_route.dashboards import write_dashboard
from sae_lens_route.evals import saelens_metrics
from sae_lens_route.models import load_model
from sae_lens_route.router import normalize
from sae_lens_route.runner import RouteSAETrainingRunner
from sae_lens_route.saes import as_routed, to_inference
from sae_lens_route.splice import RouteSAETransformer, attach

# training architecture -> its class, its options, the class it is saved as
ARCHITECTURES = {
    "topk": (saes.RouteTopKTrainingSAE, {"k": 8}, saes.RouteTopKSAE),
    "batchtopk": (saes.RouteBatchTopKTrainingSAE, {"k": 8}, saes.RouteJumpReLUSAE),
    "matryoshka_batchtopk": (
        saes.RouteMatryoshkaBatchTopKTrainingSAE,
        {"k": 8},
        saes.RouteJumpReLUSAE,
    ),
    "jumprelu": (saes.RouteJumpReLUTrainingSAE, {}, saes.RouteJumpReLUSAE),
    "standard": (saes.RouteStandardTrainingSAE, {}, saes.RouteStandardSAE),
    "gated": (saes.RouteGatedTrainingSAE, {}, saes.RouteGatedSAE),
}
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
OBJECTIVES = ["reconstruction", "assignment", "frozen"]
STEPS, STEP_TOKENS = 50, 64


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small take much longer on several threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def training_config(architecture, **options):
    training_class, defaults, _ = ARCHITECTURES[architecture]
    config_class = getattr(saes, f"{training_class.__name__}Config")
    return config_class(**{**defaults, **options})


def random_sae(architecture, d=6, d_sae=12, n_layers=3, seed=0, spread=1.0, **options):
    """A training SAE in float64 whose weights are all random; it uses every layer."""
    training_class, defaults, _ = ARCHITECTURES[architecture]
    if "k" in defaults:
        options = {"k": 3, **options}
    sizes = {"d_in": d, "d_sae": d_sae, "n_routed_layers": n_layers, "dtype": "float64"}
    options = {"decoder_norm_interval": 0, **options}
    sae = training_class(training_config(architecture, **sizes, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.normal_(generator=generator)
            if name == "threshold":
                parameter.abs_()
            elif name == "r_mag":
                parameter.mul_(0.2)
        sae.W_enc /= d**0.5
        sae.W_dec /= 3
        sae.W_router.mul_(spread / d**0.5)
        if "topk_threshold" in dict(sae.named_buffers()):
            sae.topk_threshold.fill_(0.7)
    return sae


def random_streams(tokens, n_layers=3, d=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n_layers, d, generator=generator, dtype=torch.float64)
    return x * torch.arange(1, n_layers + 1).view(-1, 1) + 0.3


def encode_by_hand(sae, x):
    """The four encoders as their papers write them, from the weights of an SAE for inference."""
    centred = x - sae.b_dec
    if isinstance(sae, saes.RouteGatedSAE):
        gate = centred @ sae.W_enc + sae.b_gate
        size = centred @ (sae.W_enc * sae.r_mag.exp()) + sae.b_mag
        return torch.where(gate > 0, size.clamp(min=0), torch.zeros_like(size))
    pre = centred @ sae.W_enc + sae.b_enc
    if isinstance(sae, saes.RouteJumpReLUSAE):
        return torch.where(pre > sae.threshold, pre.clamp(min=0), torch.zeros_like(pre))
    if isinstance(sae, saes.RouteTopKSAE):
        kept = pre >= pre.sort(dim=-1, descending=True).values[..., sae.cfg.k - 1 : sae.cfg.k]
        return torch.where(kept, pre.clamp(min=0), torch.zeros_like(pre))
    return pre.clamp(min=0)


def decode_by_hand(sae, feature_acts):
    return feature_acts @ sae.W_dec + sae.b_dec


# --- from training to the tools -------------------------------------------------------------------


@pytest.fixture(scope="session")
def tinyllama():
    return load_model(TINYLLAMA)


@pytest.fixture(scope="session")
def make_trained(tinyllama, tmp_path_factory):
    """`make_trained(architecture)`: the SAE after 50 steps on the tiny Llama, and its folder."""
    made = {}

    def make(architecture):
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture) / "sae"
            cfg = small_config(
                folder, training_tokens=STEPS * STEP_TOKENS, lr=2e-3, lr_warm_up_steps=0
            )
            cfg.sae = training_config(architecture, d_in=TINYLLAMA_WIDTH, d_sae=96)
            runner = RouteSAETrainingRunner(cfg, tokens_dataset(n_contexts=320), tinyllama)
            made[architecture] = runner.run(), folder
        return made[architecture]

    return make


def streams_of(model, sae, tokens):
    """Residual streams [n, pos, L, d] by the names in the SAE's metadata."""
    names = sae.cfg.metadata.hook_names
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=names)
    return torch.stack([cache[name] for name in names], dim=2)


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
        assert 1e-3 < moved < 0.12, name  # Adam goes about 2e-3 a step at most


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
    assert cfg["metadata"]["hook_name"] == "blocks.11.hook_resid_route"
    assert cfg["metadata"]["hook_names"] == [f"blocks.{i}.hook_resid_post" for i in range(3, 12)]

    x = torch.randn(20, 9, TINYLLAMA_WIDTH, generator=torch.Generator().manual_seed(0))
    x_route = loaded.route(x).x_route
    assert torch.equal(x_route, sae.route(x).x_route)
    acts = encode_by_hand(loaded, x_route)
    torch.testing.assert_close(loaded.encode(x_route), acts, rtol=1e-5, atol=1e-6)
    expected = decode_by_hand(loaded, acts)
    torch.testing.assert_close(loaded(x_route), expected, rtol=1e-4, atol=1e-5)


@every_architecture
def test_conversion_before_saving_is_the_same(architecture, tmp_path):
    """The training SAE as the optimizer left it: converting must not change it, saving may."""
    sae = random_sae(architecture, decoder_norm_interval=10)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    converted = to_inference(sae)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path).state_dict()
    for name, value in converted.state_dict().items():
        assert torch.equal(value, loaded[name]), name
    sae.save_inference_model(tmp_path)
    again = SAE.load_from_disk(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in again.items())


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
    name, names = "blocks.5.hook_resid_route", [f"blocks.{b}.hook_resid_post" for b in routed]
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
            assert torch.equal(hook.routing.layer, chosen)


@every_architecture
def test_our_dashboard(make_trained, tinyllama, architecture, tmp_path):
    sae = SAE.load_from_disk(make_trained(architecture)[1])
    tokens = torch.tensor(tokens_dataset(8, 24)["tokens"])
    path = write_dashboard(tinyllama, sae, tokens, tmp_path / "page.html", n_features=4)
    data = Page(path.read_text(encoding="utf-8")).data
    with torch.no_grad():
        acts = encode_by_hand(sae, sae.route(streams_of(tinyllama, sae, tokens)).x_route)
    special = torch.isin(tokens, torch.tensor(tinyllama.tokenizer.all_special_ids))
    maxima = acts.masked_fill(special.unsqueeze(-1), 0).amax((0, 1))
    assert data["architecture"] == sae.cfg.architecture() and len(data["features"]) == 4
    for feature in data["features"]:
        assert feature["max_activation"] == pytest.approx(
            float(maxima[feature["feature"]]), rel=1e-4
        )
    shown = [feature["max_activation"] for feature in data["features"]]
    assert shown == pytest.approx(maxima.topk(4).values.tolist(), rel=1e-4)


# --- what conversion keeps ------------------------------------------------------------------------


def train(sae, batches, lr=2e-3):
    """SAELens's own trainer over batches made beforehand; the learning rate falls to 0 at last."""
    n, tokens = len(batches), len(batches[0])
    config = SAETrainerConfig(
        total_training_samples=n * tokens,
        train_batch_size_samples=tokens,
        lr=lr,
        lr_end=0.0,
        lr_decay_steps=n // 2,
    )
    trainer = SAETrainer(config, sae, iter(batches))
    return trainer.fit()


def structured_streams(tokens, seed, n_layers=3, d=24, n_directions=40):
    """Four of 40 directions a token, at every layer the same ones, each layer with its own noise.

    How strong the noise is differs from token to token and layer to layer: there is something for
    a router to choose.
    """
    fixed = torch.Generator().manual_seed(12345)
    directions = torch.randn(n_directions, d, generator=fixed) / d**0.5
    generator = torch.Generator().manual_seed(seed)
    which = torch.rand(tokens, n_directions, generator=generator).topk(4, dim=-1).indices
    sizes = 1 + torch.rand(tokens, 4, generator=generator)
    signal = torch.zeros(tokens, n_directions).scatter(-1, which, sizes) @ directions
    noise = torch.randn(tokens, n_layers, d, generator=generator) / d**0.5
    return signal.unsqueeze(1) + noise * torch.rand(tokens, n_layers, 1, generator=generator)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_saved_as_jumprelu_the_same_features_fire(architecture, tmp_path):
    """The saved threshold is an average over steps (rate 0.01) of the batches' least activation."""
    torch.manual_seed(0)
    sae = ARCHITECTURES[architecture][0](
        training_config(architecture, d_in=24, d_sae=48, k=4, n_routed_layers=3)
    )
    train(sae, structured_streams(700 * 256, seed=0).split(256))
    sae.save_inference_model(tmp_path)
    saved = SAE.load_from_disk(tmp_path)
    x = structured_streams(2048, seed=1)
    with torch.no_grad():
        x_route = sae.route(x).x_route
        in_batch, alone = sae.encode(x_route) > 0, saved.encode(x_route) > 0
        assert torch.equal(saved.route(x).x_route, x_route)
        error = (saved(x_route) - x_route).pow(2).sum(-1) / x_route.pow(2).sum(-1)
    assert error.mean() < 0.5, "it learned something"
    assert in_batch.sum() == 4 * 2048
    jaccard = (in_batch & alone).sum() / (in_batch | alone).sum()
    assert jaccard >= 0.95


PLAIN = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": 4}),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": 4}),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, {"l0_coefficient": 0.1}),
    "standard": (StandardTrainingSAE, StandardTrainingSAEConfig, {"l1_coefficient": 0.1}),
    "gated": (GatedTrainingSAE, GatedTrainingSAEConfig, {"l1_coefficient": 0.1}),
}


@pytest.mark.parametrize("architecture", PLAIN)
def test_a_plain_sae_as_a_routesae_of_one_layer(architecture, tmp_path):
    """Trained by SAELens alone on n(x) of one layer; then exactly what SAELens saves, routed."""
    torch.manual_seed(0)
    plain_class, config_class, options = PLAIN[architecture]
    plain = plain_class(config_class(d_in=24, d_sae=48, **options))
    x = structured_streams(40 * 128, seed=0)[:, 1:2]
    train(plain, normalize(x[:, 0]).split(128))
    plain.save_inference_model(tmp_path)
    saved, routed = SAE.load_from_disk(tmp_path), as_routed(plain)

    assert isinstance(routed, saes.RoutedSAE) and routed.cfg.n_routed_layers == 1
    assert routed.cfg.architecture() == f"route_{saved.cfg.architecture()}"
    held_out = structured_streams(300, seed=1)[:, 1:2]
    with torch.no_grad():
        routing, n = routed.route(held_out), normalize(held_out[:, 0])
        assert torch.equal(routing.probs, torch.ones(300, 1)) and (routing.weight == 1).all()
        torch.testing.assert_close(routing.x_route, n)
        acts = saved.encode(n)
        assert 0 < (acts > 0).float().mean() < 1
        assert torch.equal(routed.encode(n), acts)
        assert torch.equal(routed.decode(acts), saved.decode(acts))
        if architecture != "batchtopk":  # which chooses by the batch while it trains
            torch.testing.assert_close(routed(n), plain(n), rtol=1e-4, atol=1e-5)
        routed.save_model(tmp_path / "routed")
        again = SAE.load_from_disk(tmp_path / "routed")
        assert torch.equal(again.encode_layers(held_out), routed.encode(routing.x_route))


def test_as_routed_names_what_has_no_routed_counterpart():
    plain = AbsTopKTrainingSAE(AbsTopKTrainingSAEConfig(d_in=8, d_sae=16, k=4))
    with pytest.raises(ValueError, match="'abstopk' has no routed counterpart 'route_abstopk'"):
        as_routed(plain)


# --- numerics of the losses -----------------------------------------------------------------------

COEFFICIENTS = {"l0": 0.01, "l1": 0.2}


def a_step(x, dead=None):
    return TrainStepInput(
        sae_in=x,
        coefficients=COEFFICIENTS,
        dead_neuron_mask=dead,
        n_training_steps=1,
        is_logging_step=False,
    )


def smooth_region(sae, x):
    """Everything that jumps: the chosen layers, the active features, and the gates."""
    routing = sae.route(x)
    parts = [routing.layer, sae.encode(routing.x_route) > 0]
    if hasattr(sae, "b_gate"):
        parts.append((routing.x_route - sae.b_dec) @ sae.W_enc + sae.b_gate > 0)
    return torch.cat([part.flatten().long() for part in parts])


@every_architecture
@pytest.mark.parametrize("routing", ["hard", "soft"])
def test_gradients_of_the_whole_loss(architecture, routing):
    """Every entry of every parameter against central differences, in float64.

    At a step of 1e-6 their own error is about 1e-9 (rounding over the step); 1e-7 is allowed. None
    of the perturbations may cross a jump. The threshold of JumpReLU is left out: its gradient is a
    straight-through estimate by design.
    """
    aggregation = "attention" if routing == "soft" else "sum"
    sae = random_sae(architecture, routing=routing, aggregation=aggregation)
    x = random_streams(7)
    step, region = 1e-6, smooth_region(sae, x)
    assert (sae.route(x).layer.bincount(minlength=3) > 0).sum() >= 2
    sae.training_forward_pass(a_step(x)).loss.backward()

    def loss():
        assert torch.equal(smooth_region(sae, x), region)
        return float(sae.training_forward_pass(a_step(x)).loss)

    checked = set()
    for name, parameter in sae.named_parameters():
        if name == "threshold":
            continue
        flat, numeric = parameter.data.view(-1), torch.zeros(parameter.numel()).double()
        with torch.no_grad():
            for i in range(len(flat)):
                here = float(flat[i])
                flat[i] = here + step
                above = loss()
                flat[i] = here - step
                numeric[i] = (above - loss()) / (2 * step)
                flat[i] = here
        torch.testing.assert_close(
            parameter.grad.view(-1),
            numeric,
            rtol=1e-6,
            atol=1e-7,
            msg=lambda m, n=name: f"{n}: {m}",
        )
        assert numeric.abs().max() > 1e-4, name
        checked.add(name)
    assert checked > {"W_router", "W_enc", "W_dec", "b_dec"}


def dead_features(d_sae=12):
    return torch.arange(d_sae) % 3 == 0


PENALTIES = {
    "standard": ("l1_loss", {}),
    "gated": ("l1_loss", {}),
    "gated, second path": ("auxiliary_reconstruction_loss", {}),
    "topk": ("auxiliary_reconstruction_loss", {"aux_loss_coefficient": 1.0}),
    "batchtopk": ("auxiliary_reconstruction_loss", {"aux_loss_coefficient": 1.0}),
    "matryoshka_batchtopk": ("auxiliary_reconstruction_loss", {"aux_loss_coefficient": 1.0}),
    "matryoshka_batchtopk, by level": (
        "auxiliary_reconstruction_loss",
        {"aux_loss_coefficient": 1.0, "use_matryoshka_aux_loss": True},
    ),
}


def penalty(sae, x_route, name):
    acts, pre = sae.encode_with_hidden_pre(x_route)
    step = a_step(x_route, dead_features())
    return sae.calculate_aux_loss(step, acts, pre, sae.decode(acts))[name]


@pytest.mark.parametrize("case", PENALTIES)
@pytest.mark.parametrize("grad", [True, False])
def test_penalties_do_not_know_the_scale_of_x_route(case, grad):
    name, options = PENALTIES[case]
    architecture = case.split(",")[0]
    sae = random_sae(architecture, **options)
    raw = random_sae(architecture, loss="mse", **options)
    with torch.no_grad():
        for parameter_name, parameter in [*sae.named_parameters(), *raw.named_parameters()]:
            if parameter_name.startswith("b_"):
                parameter.zero_()
    x_route = random_sae(architecture).route(random_streams(20)).x_route.detach()
    with torch.set_grad_enabled(grad):
        value = penalty(sae, x_route, name)
        assert value > 1e-3
        for scale in (1e-3, 0.1, 7.0, 1e4):
            torch.testing.assert_close(penalty(sae, scale * x_route, name), value)
        # and the unit is the mean norm, or the mean squared norm, of x_route
        norm = x_route.norm(dim=-1)
        unit = norm.mean() if name == "l1_loss" else (norm**2).mean()
        torch.testing.assert_close(value, penalty(raw, x_route, name) / unit)
        # in SAELens's units, shrinking x_route pays
        assert penalty(raw, 0.1 * x_route, name) < 0.11 * penalty(raw, x_route, name)


def test_the_router_is_not_paid_by_a_penalty_for_shrinking_p():
    """The gradient of ReLU's L1 loss (no biases) is orthogonal to x_route, all tokens together."""
    sae = random_sae("standard")
    with torch.no_grad():
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    x_route = sae.route(random_streams(20)).x_route.detach().requires_grad_()
    penalty(sae, x_route, "l1_loss").backward()
    along = (x_route.grad * x_route).sum()
    assert along.abs() < 1e-12 < x_route.grad.abs().max()


def by_numpy(sae, x, temperature):
    """Cross entropy of p against the balanced assignment, with nothing of the package but weights.

    In numpy, token by token and layer by layer, Sinkhorn in its multiplicative form.
    """
    inference = to_inference(sae).requires_grad_(False)
    W_router = sae.W_router.detach().numpy()
    probs, errors = [], []
    for token in x.numpy()[::4]:
        n = [(h - h.mean()) / (h.std(ddof=1) + 1e-6) for h in token]
        logits = sum(n) @ W_router
        p = np.exp(logits - logits.max())
        p /= p.sum()
        row = []
        for h in n:
            target = torch.from_numpy(p.max() * h)
            x_hat = decode_by_hand(inference, encode_by_hand(inference, target))
            row.append(float(((x_hat - target) ** 2).sum() / (target**2).sum()))
        probs.append(p)
        errors.append(row)
    probs, errors = np.array(probs), np.array(errors)
    kernel = np.exp(-errors / errors.mean() / temperature)
    v = np.ones(errors.shape[1])
    for _ in range(20):
        u = 1 / (kernel @ v)
        v = v / (v * (kernel.T @ u) * len(v) / len(u))
    target = kernel * v / (kernel @ v)[:, None]
    return -(target * np.log(probs)).sum(1).mean(), target, probs


# whose training encoder looks at each token alone, so that a token-by-token loop can follow it
ALONE = ["topk", "jumprelu", "standard", "gated"]


@pytest.mark.parametrize("architecture", ALONE)
def test_assignment_loss(architecture):
    sae = random_sae(architecture, router_objective="assignment")
    x = random_streams(43)
    output = sae.training_forward_pass(a_step(x))
    expected, target, probs = by_numpy(sae, x, temperature=0.2)
    assert float(output.losses["assignment_loss"]) == pytest.approx(expected, rel=1e-9)
    others = [loss for name, loss in output.losses.items() if name != "assignment_loss"]
    assert float(output.loss) == pytest.approx(expected + float(sum(others)), rel=1e-12)

    output.losses["assignment_loss"].backward(retain_graph=True)
    for name, parameter in sae.named_parameters():
        assert (parameter.grad is None) == (name != "W_router"), name
    # the gradient of a cross entropy at its logits is p - target
    pooled = normalize(x[::4]).sum(1)
    by_hand = pooled.T @ torch.from_numpy(probs - target) / len(pooled)
    torch.testing.assert_close(sae.W_router.grad, by_hand, rtol=1e-8, atol=1e-10)


@every_architecture
def test_under_assignment_the_reconstruction_does_not_reach_the_router(architecture):
    sae = random_sae(architecture, router_objective="assignment", aggregation="attention")
    output = sae.training_forward_pass(a_step(random_streams(40)))
    rest = [loss for name, loss in output.losses.items() if name != "assignment_loss"]
    sum(rest).backward(retain_graph=True)
    assert sae.W_router.grad is None and sae.q_router.grad is None
    assert sae.W_enc.grad.abs().max() > 0 and sae.W_dec.grad.abs().max() > 0
    dictionary = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    output.losses["assignment_loss"].backward()
    assert sae.W_router.grad.abs().max() > 0 and sae.q_router.grad.abs().max() > 0
    for name, gradient in dictionary.items():
        assert torch.equal(dict(sae.named_parameters())[name].grad, gradient), name


@every_architecture
@pytest.mark.parametrize("aggregation", ["sum", "attention"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_each_objective_trains(architecture, aggregation, objective):
    torch.manual_seed(0)
    options = {"router_objective": objective, "aggregation": aggregation}
    sae = ARCHITECTURES[architecture][0](
        training_config(architecture, d_in=24, d_sae=48, n_routed_layers=3, **options)
    )
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    train(sae, structured_streams(8 * 64, seed=0).split(64))
    router = {"W_router"} | ({"q_router"} if aggregation == "attention" else set())
    for name in router:
        assert torch.equal(sae.state_dict()[name], before[name]) == (objective == "frozen"), name
    for name in ("W_enc", "W_dec", "b_dec"):
        assert not torch.equal(sae.state_dict()[name], before[name]), name


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "gated"])
def test_without_latent_bias(architecture):
    """As in Equation 10: b_enc stays at its 0, everything else is trained."""
    torch.manual_seed(0)
    sae = ARCHITECTURES[architecture][0](
        training_config(architecture, d_in=24, d_sae=48, n_routed_layers=3, latent_bias=False)
    )
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    train(sae, structured_streams(8 * 64, seed=0).split(64))
    assert not sae.b_enc.any()
    for name in ("W_router", "W_enc", "W_dec", "b_dec"):
        assert not torch.equal(sae.state_dict()[name], before[name]), name


def test_gated_has_no_latent_bias_to_hold():
    with pytest.raises(ValueError, match="latent_bias=False: route_gated has no b_enc"):
        training_config("gated", d_in=8, d_sae=16, latent_bias=False)


@pytest.mark.parametrize("architecture", ["topk", "standard"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_objective": "assignment", "routing": "soft"}, r"router_objective='assignment'.*"),
        ({"router_objective": "assignment", "routing": "uniform"}, r"routing='uniform'"),
        ({"router_objective": "teacher"}, r"router_objective='teacher'.*'assignment'"),
        ({"loss": "l2"}, r"loss='l2'.*'normalized_mse'"),
        ({"routing": "both"}, r"routing='both'.*'hard'"),
        ({"aggregation": "max"}, r"aggregation='max'.*'sum'"),
        ({"decoder_norm_interval": -1}, r"decoder_norm_interval=-1"),
        ({"n_routed_layers": 0}, r"n_routed_layers=0"),
        ({"normalize_activations": "layer_norm"}, r"normalize_activations='layer_norm'"),
        ({"layer_shares": [0.5, 0.25, 0.25]}, r"layer_shares=\[0.5, 0.25, 0.25\].*'hard'"),
    ],
)
def test_options_that_do_not_go_together_are_named(architecture, changes, message):
    with pytest.raises(ValueError, match=message):
        training_config(architecture, **{"d_in": 8, "d_sae": 16, "n_routed_layers": 3, **changes})


@pytest.mark.parametrize("k", [0, 17])
def test_k_is_checked_where_there_is_one(k):
    for architecture in ("topk", "batchtopk", "matryoshka_batchtopk"):
        with pytest.raises(ValueError, match=f"k={k}: must be between 1 and d_sae=16"):
            training_config(architecture, d_in=8, d_sae=16, k=k)


@every_architecture
@pytest.mark.parametrize("routing", ["hard", "uniform"])
def test_layer_errors_token_by_token(architecture, routing):
    sae = to_inference(random_sae(architecture, routing=routing))
    x = random_streams(15)
    routed = sae.route(x)
    table = torch.zeros(15, 3, dtype=torch.float64)
    for t, token in enumerate(x):
        n = [(h - h.mean()) / (((h - h.mean()) ** 2).sum() / 5) ** 0.5 for h in token]
        p = torch.softmax(sum(n) @ sae.W_router, 0).max() if routing == "hard" else 1.0
        for i in range(3):
            target = p * n[i]
            error = decode_by_hand(sae, encode_by_hand(sae, target)) - target
            table[t, i] = error @ error / (target @ target)
    # the loop leaves out the 1e-6 beside the standard deviation
    torch.testing.assert_close(sae.layer_errors(x, routed), table, rtol=1e-4, atol=1e-5)
    own = sae.layer_errors(x, routed).gather(1, routed.layer[:, None]).squeeze(1)
    x_hat = sae(routed.x_route)
    by_route = (x_hat - routed.x_route).pow(2).sum(-1) / routed.x_route.pow(2).sum(-1)
    torch.testing.assert_close(own, by_route, rtol=1e-9, atol=1e-12)
    # any leading shape
    again = sae.layer_errors(x.view(3, 5, 3, 6), sae.route(x.view(3, 5, 3, 6)))
    if routing == "hard":
        torch.testing.assert_close(again.flatten(0, 1), sae.layer_errors(x, routed))
