"""The training runner: every architecture, what it writes, and what it refuses."""

import json
import os
import subprocess
import sys

import pytest
import torch
from sae_lens import SAE
from support.small import TINYLLAMA_WIDTH, small_config, tokens_dataset

from sae_lens_route.config import trainable_architectures, training_config
from sae_lens_route.errors import UserError
from sae_lens_route.saes.crosscoder import CrosscoderSAEMixin
from sae_lens_route.saes.inference import to_inference
from sae_lens_route.training.runner import RouteSAETrainingRunner


@pytest.fixture(scope="module")
def trained(tinyllama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "sae"
    return RouteSAETrainingRunner(small_config(folder), None, tinyllama).run(), folder


def architecture_config(folder, architecture, **changes):
    cfg = small_config(folder, lr=2e-3, lr_warm_up_steps=0, **changes)
    cfg.sae = training_config(architecture, {"d_in": TINYLLAMA_WIDTH, "d_sae": 96})
    return cfg


@pytest.mark.parametrize("architecture", trainable_architectures())
def test_every_architecture_trains_saves_and_loads(tinyllama, tmp_path, architecture):
    blocks = [2, 5, 9]
    cfg = architecture_config(tmp_path / "a", architecture, routed_blocks=blocks, n_checkpoints=1)
    untrained = RouteSAETrainingRunner(cfg, tokens_dataset(320), tinyllama).sae
    before = {name: weight.clone() for name, weight in untrained.state_dict().items()}
    runner = RouteSAETrainingRunner(cfg, tokens_dataset(320), tinyllama, override_sae=untrained)
    sae = runner.run()

    assert not torch.equal(sae.W_dec, before["W_dec"])
    records = [
        json.loads(line) for line in (tmp_path / "a" / "train_log.jsonl").read_text().splitlines()
    ]
    assert records[-1]["step"] == 12 and 0 < records[-1]["loss"] < float("inf")

    loaded = SAE.load_from_disk(tmp_path / "a")
    kind = "stack" if isinstance(loaded, CrosscoderSAEMixin) else "route"
    metadata = loaded.cfg.metadata
    assert metadata.hook_name == f"blocks.9.{kind}.hook_resid_post"
    assert metadata.hook_names == [f"blocks.{block}.hook_resid_post" for block in blocks]
    assert metadata.routed_blocks == blocks and "routed_layers" not in metadata
    assert loaded.cfg.n_routed_layers == 3
    assert loaded.cfg.d_in == TINYLLAMA_WIDTH * (3 if kind == "stack" else 1)
    x = torch.randn(20, 3, TINYLLAMA_WIDTH, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded.encode_layers(x), to_inference(sae).encode_layers(x))

    (checkpoint,) = (tmp_path / "a" / "checkpoints").glob("*/*")
    cfg = architecture_config(
        tmp_path / "b",
        architecture,
        routed_blocks=blocks,
        resume_from_checkpoint=str(checkpoint),
    )
    resumed = RouteSAETrainingRunner(cfg, tokens_dataset(320), tinyllama).run()
    for name, weight in sae.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, rtol=0, atol=1e-6, msg=name)


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
    assert cfg["metadata"]["hook_name"] == "blocks.11.route.hook_resid_post"
    assert cfg["metadata"]["hook_names"] == [f"blocks.{i}.hook_resid_post" for i in range(3, 12)]
    assert cfg["metadata"]["exclude_special_tokens"] is True
    last = json.loads((folder / "train_log.jsonl").read_text().splitlines()[-1])
    assert last["tokens"] == 16 * 4 * 12
    assert last["l0"] <= 8
    shares = [last[f"route_share/block_{i}"] for i in range(3, 12)]
    assert sum(shares) == pytest.approx(1)


def assert_same_functions(a, b):
    x = torch.randn(20, 9, 64, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(a.route(x), b.route(x), strict=True):
        assert torch.equal(ours, theirs)
    x_route = a.route(x).x_route
    assert torch.equal(a.encode(x_route), b.encode(x_route))
    assert torch.equal(a.decode(a.encode(x_route)), b.decode(b.encode(x_route)))


def test_load_from_disk_returns_the_trained_sae(trained):
    sae, folder = trained
    loaded = SAE.load_from_disk(folder)
    assert_same_functions(sae, loaded)
    torch.testing.assert_close(loaded.W_dec.norm(dim=-1), torch.ones(128))
    before = loaded.W_dec.clone()
    loaded.fold_W_dec_norm()
    assert torch.equal(before, loaded.W_dec)


def test_from_pretrained_returns_the_trained_sae(trained, tmp_path):
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


def test_prefetching_changes_nothing(tinyllama):
    plain = RouteSAETrainingRunner(small_config(None), None, tinyllama).run()
    cfg = small_config(None, prefetch_llm_batches=2)
    assert torch.equal(plain.W_enc, RouteSAETrainingRunner(cfg, None, tinyllama).run().W_enc)


@pytest.mark.parametrize("routing", ["soft", "uniform"])
def test_other_routings_train(tinyllama, routing):
    cfg = small_config(None, sae={"routing": routing})
    assert torch.isfinite(RouteSAETrainingRunner(cfg, None, tinyllama).run().W_enc).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routed_blocks": [3, 99]}, r"routed_blocks.*99"),
        ({"routed_blocks": [4, 3]}, r"routed_blocks=\[4, 3\]: must ascend"),
        ({"hook_names": ["blocks.3.hook_nothing"], "routed_blocks": [3]}, "hook_nothing"),
        ({"sae": {"d_in": 32}}, r"sae\.d_in=32: the residual stream .* has 64"),
        ({"sae": {"k": 129}}, r"k=129: must be between 1 and d_sae=128"),
        ({"training_tokens": 10}, r"training_tokens=10: fewer than one step"),
        ({"model_name": "./nowhere"}, r"model_name='./nowhere'"),
        ({"dataset_path": "./nowhere"}, r"dataset_path='./nowhere'"),
        ({"activations_mixing_fraction": 1.5}, "activations_mixing_fraction=1.5"),
        ({"train_batch_size_tokens": 10**9, "training_tokens": 10**9}, "would take .* GB on cpu"),
    ],
)
def test_mistakes_are_named_before_training(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        RouteSAETrainingRunner(small_config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_not_overwritten(trained):
    _, folder = trained
    with pytest.raises(UserError, match="already holds a run"):
        RouteSAETrainingRunner(small_config(folder))


def test_a_hugging_face_model_trains_like_the_hooked_one(tmp_path):
    """The same residual streams under other names: the same losses, up to rounding in the model.

    Rounding moves a token to another block or feature now and then, which Adam's first steps
    amplify: half a percent after 12 steps of 64 tokens.
    """
    losses = {}
    for kind in ("HookedTransformer", "AutoModelForCausalLM"):
        sae = RouteSAETrainingRunner(small_config(tmp_path / kind, model_class_name=kind)).run()
        log = (tmp_path / kind / "train_log.jsonl").read_text().splitlines()
        losses[kind] = [json.loads(line)["loss"] for line in log]
    assert sae.cfg.metadata.hook_names[0] == "model.layers.3"
    assert sae.cfg.metadata.hook_name == "blocks.11.route.hook_resid_post"
    ours, theirs = losses.values()
    assert theirs == pytest.approx(ours, rel=1e-2)
