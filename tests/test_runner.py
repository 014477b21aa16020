"""The training runner: what it writes, that it resumes exactly, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from golden_numbers import golden_sae, load
from sae_lens import SAE, TrainingSAE
from sae_lens.training._interruption import InterruptedException
from safetensors.torch import load_file
from small import small_config

from sae_lens_route.reference_checkpoint import reference_converter
from sae_lens_route.runner import RouteSAERunnerConfig, RouteSAETrainingRunner


def test_defaults_are_the_papers():
    from sae_lens_route import RouteTopKTrainingSAEConfig

    cfg = RouteSAERunnerConfig(sae=RouteTopKTrainingSAEConfig(d_in=2048, d_sae=16384))
    assert (cfg.sae.k, cfg.lr, cfg.context_size, cfg.store_batch_size_prompts) == (
        64,
        5e-4,
        512,
        64,
    )
    assert cfg.train_batch_size_tokens == 64 * 512
    assert (cfg.adam_beta1, cfg.adam_beta2) == (0.9, 0.999)
    steps = 100_000_000 // (64 * 512)
    assert (cfg.lr_warm_up_steps, cfg.lr_decay_steps) == (int(0.05 * steps), steps // 5)
    assert cfg.activations_mixing_fraction == 0
    assert not cfg.logger.log_to_wandb


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "sae"
    return RouteSAETrainingRunner(small_config(folder)).run(), folder


def test_writes_saelens_files_and_a_log(trained):
    _, folder = trained
    written = {path.name for path in folder.iterdir()}
    assert written >= {
        "cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
        "runner_cfg.json",
        "train_log.jsonl",
    }
    cfg = json.loads((folder / "cfg.json").read_text())
    assert cfg["architecture"] == "route_topk"
    assert cfg["metadata"]["hook_name"] == "blocks.11.hook_resid_route"
    assert cfg["metadata"]["hook_names"] == [f"blocks.{i}.hook_resid_post" for i in range(3, 12)]
    assert cfg["metadata"]["exclude_special_tokens"] is True
    last = json.loads((folder / "train_log.jsonl").read_text().splitlines()[-1])
    assert last["tokens"] == 16 * 4 * 12
    assert last["l0"] <= 8
    shares = [last[f"route_share/{i}"] for i in range(9)]
    assert sum(shares) == pytest.approx(1)


def assert_same_functions(a, b):
    x = torch.randn(20, 9, 64, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(a.route(x), b.route(x), strict=True):
        assert torch.equal(ours, theirs)
    x_route = a.route(x).x_route
    assert torch.equal(a.encode(x_route), b.encode(x_route))
    assert torch.equal(a.decode(a.encode(x_route)), b.decode(b.encode(x_route)))


def assert_same_weights(a, b):
    """Equal up to the last bits of float32: most runs agree exactly, now and then one does not."""
    for name, weight in a.state_dict().items():
        torch.testing.assert_close(weight, b.state_dict()[name], rtol=0, atol=1e-6, msg=name)


def test_load_from_disk_gives_the_trained_sae(trained):
    sae, folder = trained
    loaded = SAE.load_from_disk(folder)
    assert_same_functions(sae, loaded)
    torch.testing.assert_close(loaded.W_dec.norm(dim=-1), torch.ones(128))
    before = loaded.W_dec.clone()
    loaded.fold_W_dec_norm()
    assert torch.equal(before, loaded.W_dec)


def test_from_pretrained_gives_the_trained_sae(trained, tmp_path):
    """The real Hub loader, offline, from a cache as `huggingface_hub` lays it out."""
    sae, folder = trained
    snapshot = tmp_path / "models--someone--route" / "snapshots" / "0" / "demo"
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        if file.is_file():
            (snapshot / file.name).write_bytes(file.read_bytes())
    refs = tmp_path / "models--someone--route" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0")
    code = (
        "import sys, torch, sae_lens_route; from sae_lens import SAE;"
        "sae = SAE.from_pretrained('someone/route', 'demo');"
        "torch.save({k: v for k, v in sae.state_dict().items()}, sys.argv[1]);"
        "assert type(sae).__name__ == 'RouteTopKSAE' and sae.cfg.metadata.hook_names"
    )
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    out = tmp_path / "state.pt"
    subprocess.run([sys.executable, "-c", code, str(out)], check=True, env=env)
    loaded = SAE.load_from_disk(folder)
    loaded.load_state_dict(torch.load(out, weights_only=True))
    assert_same_functions(sae, loaded)


def test_reference_checkpoint_loads_through_the_converter(tmp_path):
    tensors, info = load("seed0_route")
    names = [name for name in tensors if name.startswith("param.")]
    torch.save({n.removeprefix("param."): tensors[n] for n in names}, tmp_path / "model.pt")
    loaded = SAE.load_from_disk(tmp_path / "model.pt", converter=reference_converter(k=info["k"]))
    assert type(loaded).__name__ == "RouteTopKSAE"
    x = tensors["x_raw"][0]
    expected = golden_sae(tensors, info)
    assert torch.equal(loaded.route(x).probs, expected.route(x).probs)
    torch.testing.assert_close(
        loaded.decode(loaded.encode_layers(x)), tensors["hard_sum.x_hat"], rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match="not a RouteSAE checkpoint"):
        torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
        SAE.load_from_disk(tmp_path / "other.pt", converter=reference_converter(k=4))


@pytest.mark.parametrize("prefetch", [False, 2])
@pytest.mark.parametrize("routing", ["hard", "uniform"])
def test_resuming_from_a_checkpoint_is_exact(tmp_path, routing, prefetch):
    """Uniform routing too, which goes on drawing layers where it stopped, and reading ahead."""
    options = {"sae": {"routing": routing}, "prefetch_llm_batches": prefetch}
    whole = RouteSAETrainingRunner(small_config(tmp_path / "a", n_checkpoints=2, **options)).run()
    checkpoints = sorted((tmp_path / "a" / "checkpoints").glob("*/*"), key=lambda p: int(p.name))
    assert len(checkpoints) == 2
    rest = RouteSAETrainingRunner(
        small_config(tmp_path / "b", resume_from_checkpoint=str(checkpoints[0]), **options)
    ).run()
    assert_same_weights(whole, rest)


def test_an_interrupted_run_leaves_a_whole_checkpoint_and_goes_on_exactly(tmp_path):
    whole = RouteSAETrainingRunner(small_config(None)).run()
    runner = RouteSAETrainingRunner(small_config(tmp_path / "a"))
    steps = iter(range(100))
    inner = runner.activations_store.get_data_loader()

    def interrupted_loader():
        for batch in inner:
            if next(steps) == 5:
                os.kill(os.getpid(), signal.SIGINT)  # in the middle of a step
            yield batch

    runner.activations_store._dataloader = interrupted_loader()
    with pytest.raises(InterruptedException):
        runner.run()
    (checkpoint,) = (tmp_path / "a" / "checkpoints").glob("*/*")
    assert not (tmp_path / "a" / "cfg.json").exists()
    rest = RouteSAETrainingRunner(
        small_config(tmp_path / "a", resume_from_checkpoint=str(checkpoint))
    ).run()
    assert_same_weights(whole, rest)


def test_a_checkpoint_is_a_training_sae(tmp_path):
    RouteSAETrainingRunner(small_config(tmp_path / "a", n_checkpoints=1)).run()
    (checkpoint,) = (tmp_path / "a" / "checkpoints").glob("*/*")
    assert type(TrainingSAE.load_from_disk(checkpoint)).__name__ == "RouteTopKTrainingSAE"
    assert load_file(checkpoint / "sae_weights.safetensors").keys() >= {"W_router"}


def test_prefetching_gives_the_same_sae():
    plain = RouteSAETrainingRunner(small_config(None)).run()
    prefetched = RouteSAETrainingRunner(small_config(None, prefetch_llm_batches=2)).run()
    assert torch.equal(plain.W_enc, prefetched.W_enc)


def test_soft_and_uniform_routing_train():
    for routing in ("soft", "uniform"):
        sae = RouteSAETrainingRunner(small_config(None, sae={"routing": routing})).run()
        assert torch.isfinite(sae.W_enc).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routed_layers": [3, 99]}, r"routed_layers.*99"),
        ({"routed_layers": [4, 3]}, r"routed_layers=\[4, 3\]: must ascend"),
        ({"hook_names": ["blocks.3.hook_nothing"], "routed_layers": [3]}, "hook_nothing"),
        ({"sae": {"d_in": 32}}, r"sae\.d_in=32: the residual stream .* has 64"),
        ({"sae": {"k": 129}}, r"k=129: must be between 1 and d_sae=128"),
        ({"training_tokens": 10}, r"training_tokens=10: fewer than one step"),
        ({"model_name": "./nowhere"}, r"model_name='./nowhere'"),
        ({"dataset_path": "./nowhere"}, r"dataset_path='./nowhere'"),
        ({"activations_mixing_fraction": 1.5}, "activations_mixing_fraction=1.5"),
    ],
)
def test_what_does_not_fit_is_named_before_training(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        RouteSAETrainingRunner(small_config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_not_written_over(trained):
    _, folder = trained
    with pytest.raises(ValueError, match="already holds a run"):
        RouteSAETrainingRunner(small_config(folder))


def test_killed_run_keeps_its_checkpoints(tmp_path):
    """SIGKILL loses what came after the last checkpoint, and nothing else."""
    code = (
        "import sys; from small import small_config; from pathlib import Path;"
        "from sae_lens_route.runner import RouteSAETrainingRunner;"
        "cfg = small_config(Path(sys.argv[1]), training_tokens=64 * 100_000, n_checkpoints=2000);"
        "RouteSAETrainingRunner(cfg).run()"
    )
    tests = Path(__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a")],
        cwd=tests,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(found := list((tmp_path / "a").glob("checkpoints/*/*/trainer_state.pt"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    process.kill()
    process.wait()
    first = min(found, key=lambda p: int(p.parent.name)).parent
    cfg = small_config(
        tmp_path / "b",
        resume_from_checkpoint=str(first),
        training_tokens=int(first.name) + 64 * 3,
    )
    RouteSAETrainingRunner(cfg).run()
    assert (tmp_path / "b" / "sae_weights.safetensors").exists()


def test_hugging_face_model_trains_like_the_hooked_one(tmp_path):
    """The same residual streams under other names: the same losses, up to rounding in the model.

    Rounding moves a token to another layer or feature now and then, which Adam's first steps
    amplify: half a percent after 12 steps of 64 tokens.
    """
    losses = {}
    for kind in ("HookedTransformer", "AutoModelForCausalLM"):
        sae = RouteSAETrainingRunner(small_config(tmp_path / kind, model_class_name=kind)).run()
        log = (tmp_path / kind / "train_log.jsonl").read_text().splitlines()
        losses[kind] = [json.loads(line)["loss"] for line in log]
    assert sae.cfg.metadata.hook_names[0] == "model.layers.3"
    assert sae.cfg.metadata.hook_name == "blocks.11.hook_resid_route"
    ours, theirs = losses.values()
    assert theirs == pytest.approx(ours, rel=1e-2)
