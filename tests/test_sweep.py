"""Sweeps: bits of separate runs, one forward pass for all, whole checkpoints, the table."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file
from small import TINYLLAMA, TINYLLAMA_WIDTH, small_config
from test_evals import assert_close

from sae_lens_route.activations import RoutedActivationsStore
from sae_lens_route.evals import evaluate, evaluate_all
from sae_lens_route.models import load_model
from sae_lens_route.router import normalize
from sae_lens_route.runner import RouteSAETrainingRunner
from sae_lens_route.saes import to_inference
from sae_lens_route.sweep import (
    SweepEntry,
    SweepRunner,
    evaluate_sweep,
    expand_runs,
)

CONSTANT_LR = {"lr_warm_up_steps": 0, "lr_decay_steps": 0}
BLOCKS = [3, 4, 5, 6, 7]
ROUTED = {
    "hard": {"k": [4, 8]},
    "mean": {"k": 8, "aggregation": "mean", "loss": "mse"},
    "assignment": {"k": 8, "router_objective": "assignment"},
    "frozen": {"k": 8, "router_objective": "frozen"},
    "uniform": {"k": 8, "routing": "uniform"},
    "shares": {"k": 8, "routing": "uniform", "layer_shares": [0.5, 0.2, 0.1, 0.1, 0.1]},
    "soft": {"k": 8, "routing": "soft"},
    "batchtopk": {"k": 8, "architecture": "route_batchtopk"},
    "jumprelu": {"architecture": "route_jumprelu"},
    "gated": {"architecture": "route_gated"},
    "first blocks": {"k": 8, "blocks": [3, 4, 5]},
    "blocks with a gap": {"k": 8, "blocks": [4, 6]},
    "one block": {"k": 8, "blocks": [7]},
}
OTHERS = {
    "plain topk": {"k": 8, "architecture": "topk", "blocks": [5]},
    "plain gated": {"architecture": "gated", "blocks": [7]},
    "crosscoder": {"architecture": "crosscoder"},
    "crosscoder of two": {"k": 8, "architecture": "crosscoder_topk", "blocks": [3, 6]},
}
FEW = {
    "hard": {"k": [4, 8]},
    "uniform": {"k": 8, "routing": "uniform"},
    "batchtopk": {"k": 8, "architecture": "route_batchtopk"},
    "plain": {"k": 8, "architecture": "topk", "blocks": [7]},
    "crosscoder": {"architecture": "crosscoder_topk", "k": 8, "blocks": [3, 5, 7]},
}


def expand(runs, seeds=(0,)):
    sized = {label: {"d_sae": 96, **settings} for label, settings in runs.items()}
    return expand_runs(sized, TINYLLAMA_WIDTH, seeds)


def config(output_path=None, **changes):
    return small_config(output_path, **{"routed_layers": BLOCKS, **changes})


@pytest.fixture(scope="module")
def model():
    return load_model(TINYLLAMA)


@pytest.fixture(scope="module")
def entries():
    return expand(ROUTED | OTHERS)


@pytest.fixture(scope="module")
def swept(model, entries, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "out"
    return SweepRunner(config(folder), entries, override_model=model).run(), folder


def assert_same_bits(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, weight in a.state_dict().items():
        assert torch.equal(weight, b.state_dict()[name]), name


# --- the same as separate runs -------------------------------------------------------------------


@pytest.mark.parametrize("name", expand(ROUTED))
def test_an_entry_has_the_bits_of_a_run_of_its_own(model, entries, swept, name):
    entry = entries[name]
    cfg = config(routed_layers=entry.blocks or BLOCKS, seed=entry.seed)
    cfg.sae = entry.sae
    alone = RouteSAETrainingRunner(cfg, override_model=model).run()
    assert_same_bits(to_inference(alone), swept[0][name])


@pytest.mark.parametrize("name", OTHERS)
def test_what_has_no_runner_of_its_own_has_the_bits_of_saelens_trainer(model, entries, swept, name):
    entry = entries[name]
    blocks = entry.blocks or BLOCKS
    cfg = config(routed_layers=blocks)
    cfg.resolve(model)
    batches = iter(RoutedActivationsStore.from_config(model, cfg))
    sae_config = entry.sae
    if name.startswith("plain"):
        batches = (normalize(batch.squeeze(1)) for batch in batches)
    else:
        d_in = len(blocks) * TINYLLAMA_WIDTH
        sae_config = replace(sae_config, n_routed_layers=len(blocks), d_in=d_in)
    torch.manual_seed(entry.seed)
    sae = TrainingSAE.from_dict(sae_config.to_dict())
    trained = SAETrainer(cfg.to_sae_trainer_config(), sae, batches).fit()
    for parameter, weight in to_inference(trained).state_dict().items():
        assert torch.equal(weight, swept[0][name].state_dict()[parameter]), parameter


def test_seeds_and_order_of_the_text_are_what_a_run_would_have(model):
    """Two seeds of weights over one shuffled stream."""
    shuffled = {"activations_mixing_fraction": 0.5, "n_batches_in_buffer": 4}
    entries = expand({"hard": {"k": 8}}, seeds=[3, 4])
    saes = SweepRunner(config(**shuffled), entries, override_model=model).run()
    assert not torch.equal(*(sae.W_enc for sae in saes.values()))
    cfg = config(**shuffled)
    runner = RouteSAETrainingRunner(
        cfg,
        override_model=model,
        override_sae=SweepRunner(cfg, entries, None, model).saes["hard seed=4"],
    )
    assert_same_bits(to_inference(runner.run()), saes["hard seed=4"])


def test_the_language_model_runs_once_for_all(model):
    def blocks_run(entries):
        calls = []
        handle = model.blocks[3].register_forward_hook(lambda *_: calls.append(1))
        try:
            SweepRunner(config(), entries, override_model=model).run()
        finally:
            handle.remove()
        return len(calls)

    passes = 12  # 16 * 4 * 12 tokens, 16 * 4 a pass, special tokens left out: one or two more
    one, many = blocks_run(expand({"one": {"k": 8}})), blocks_run(expand(FEW))
    assert passes <= one <= passes + 2
    assert many == one


def test_prefetching_changes_nothing(model):
    entries = expand({"hard": {"k": 8}, "plain": FEW["plain"]})
    plain = SweepRunner(config(), entries, override_model=model).run()
    ahead = SweepRunner(config(prefetch_llm_batches=3), entries, override_model=model).run()
    for name in entries:
        assert_same_bits(plain[name], ahead[name])


# --- stopping and going on -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(model):
    return SweepRunner(config(), expand(FEW), override_model=model).run()


def interrupted_at(runner, step):
    """SIGINT while a batch is being made."""
    inner = runner.activations_store.get_data_loader()

    def loader():
        for n, batch in enumerate(inner):
            if n == step:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    runner.activations_store._dataloader = loader()
    with pytest.raises(InterruptedException):
        runner.run()


@pytest.mark.parametrize("prefetch", [False, 2])
def test_an_interrupted_sweep_goes_on_exactly(model, whole, tmp_path, prefetch):
    options = {"prefetch_llm_batches": prefetch}
    runner = SweepRunner(config(tmp_path, **options), expand(FEW), override_model=model)
    interrupted_at(runner, 5)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*/*")
    assert int(checkpoint.name) < 64 * 12
    assert not (tmp_path / "uniform").exists()
    cfg = config(tmp_path, resume_from_checkpoint=str(checkpoint), **options)
    rest = SweepRunner(cfg, expand(FEW), override_model=model).run()
    for name in whole:
        assert_same_bits(whole[name], rest[name])
    log = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in log if line["name"] == "plain"][-1] == 64 * 12


def test_any_checkpoint_goes_on_exactly(model, whole, tmp_path):
    SweepRunner(config(tmp_path / "a", n_checkpoints=2), expand(FEW), override_model=model).run()
    checkpoints = sorted((tmp_path / "a/checkpoints").glob("*/*"), key=lambda path: int(path.name))
    assert len(checkpoints) == 2
    cfg = config(tmp_path / "b", resume_from_checkpoint=str(checkpoints[0]))
    rest = SweepRunner(cfg, expand(FEW), override_model=model).run()
    for name in whole:
        assert_same_bits(whole[name], rest[name])


def test_an_entry_can_be_left_behind(model, whole, tmp_path):
    """What goes wrong with one of them (its loss is NaN, say) need not cost the others."""
    SweepRunner(config(tmp_path / "a", n_checkpoints=1), expand(FEW), override_model=model).run()
    (checkpoint,) = (tmp_path / "a" / "checkpoints").glob("*/*")
    kept = {name: entry for name, entry in expand(FEW).items() if name in ("plain", "uniform")}
    cfg = config(tmp_path / "b", resume_from_checkpoint=str(checkpoint))
    rest = SweepRunner(cfg, kept, override_model=model).run()
    for name in kept:
        assert_same_bits(whole[name], rest[name])


def test_a_killed_sweep_keeps_its_checkpoints(model, tmp_path):
    """SIGKILL loses what came after the last checkpoint, and nothing else."""
    code = (
        "import sys; from pathlib import Path; import test_sweep as t;"
        "cfg = t.config(Path(sys.argv[1]), training_tokens=64 * 100_000, n_checkpoints=5000,"
        "**t.CONSTANT_LR);"
        "t.SweepRunner(cfg, t.expand(t.FEW)).run()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a")],
        cwd=Path(__file__).parent,
        stderr=subprocess.DEVNULL,
    )
    pattern = "checkpoints/*/*/activations_store_state.safetensors"
    deadline = time.monotonic() + 120
    while len(found := list((tmp_path / "a").glob(pattern))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    first = min((path.parent for path in found), key=lambda path: int(path.name))
    until = int(first.name) + 64 * 2
    cfg = config(
        tmp_path / "b", resume_from_checkpoint=str(first), training_tokens=until, **CONSTANT_LR
    )
    rest = SweepRunner(cfg, expand(FEW), override_model=model).run()
    cfg = config(training_tokens=until, **CONSTANT_LR)
    whole = SweepRunner(cfg, expand(FEW), override_model=model).run()
    for name in whole:
        for key, weight in whole[name].state_dict().items():
            torch.testing.assert_close(weight, rest[name].state_dict()[key], rtol=0, atol=1e-6)


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "topkk"}, r"run 'x' .*architecture='topkk': must be one of .*topk"),
        ({"kk": 3, "d_sae": 8}, r"run 'x' .*unknown field 'kk' of route_topk; did you mean 'k'\?"),
        ({"seed": 3, "d_sae": 8}, r"run 'x' .*unknown field 'seed' of route_topk"),
        ({"k": 3}, r"run 'x' .*d_sae is missing"),
        ({"blocks": 3, "d_sae": 8}, r"run 'x' .*blocks=3: must be a list"),
        ({"d_in": 3}, r"run 'x' .*d_in=3: is filled in; leave it out"),
        ({"n_routed_layers": 3}, r"run 'x' .*n_routed_layers=3: is filled in"),
        ({"k": 9, "d_sae": 8}, r"run 'x' .*k=9: must be between 1 and d_sae=8"),
        ({"k": [], "d_sae": 8}, r"run 'x' .*k=\[\]: give at least one value"),
        ({"k": [3, 3], "d_sae": 8}, r"run 'x' .*k=\[3, 3\]: give at least one value, each once"),
        ({"routing": "odd", "d_sae": 8}, r"run 'x' .*routing='odd': must be one of 'hard'"),
        (
            {"architecture": "jumprelu", "l0_coefficient": [1], "target_l0": [8], "d_sae": 8},
            r"run 'x' .*l0_coefficient and target_l0 are lists: only one can be",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        expand_runs({"x": settings}, TINYLLAMA_WIDTH, [0])


def test_names_that_would_meet_are_refused():
    settings = {"d_sae": 8, "k": 2}
    runs = {"x": {**settings, "k": [2, 3]}, "x k=2": settings}
    with pytest.raises(ValueError, match=r"run 'x k=2' .*there is another 'x k=2'"):
        expand_runs(runs, TINYLLAMA_WIDTH, [0])
    for seeds in ([], [1, 1]):
        with pytest.raises(ValueError, match=r"seeds=\[.*\]: give at least one, each once"):
            expand_runs({"x": settings}, TINYLLAMA_WIDTH, seeds)


def one_entry(**settings):
    (entry,) = expand({"x": {"k": 8, **settings}}).values()
    return entry


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("x", one_entry(blocks=[2, 3]), r"entry 'x': blocks=\[2, 3\] must .*\[3, 4, 5, 6, 7\]"),
        ("x", one_entry(blocks=[5, 4]), r"entry 'x': blocks=\[5, 4\] must ascend"),
        ("x", one_entry(blocks=[]), r"entry 'x': blocks=\[\] must"),
        ("x", one_entry(architecture="topk"), r"entry 'x': 'topk' has no router .*blocks=\[7\]"),
        (
            "x",
            one_entry(architecture="topk", blocks=[3, 4]),
            r"entry 'x': 'topk' .*blocks=\[4\], or take route_topk",
        ),
        (
            "x",
            one_entry(architecture="topk", blocks=[3], k=97),
            r"entry 'x': k=97 must be between 1 and d_sae=96",
        ),
        (
            "x",
            one_entry(architecture="topk", blocks=[3], normalize_activations="layer_norm"),
            r"entry 'x': normalize_activations='layer_norm' must be 'none'",
        ),
        (
            "x",
            SweepEntry(SAE_TRAINING_CLASS_REGISTRY["abstopk"][1](d_in=64, d_sae=96, k=8), [3]),
            r"entry 'x': architecture='abstopk' cannot be saved .* no 'route_abstopk'",
        ),
        (
            "x",
            one_entry(routing="uniform", layer_shares=[0.5, 0.5]),
            r"entry 'x': layer_shares=\[0.5, 0.5\]: .* each of the 5 routed layers",
        ),
        ("a/b", one_entry(), r"entry 'a/b': its name is that of a folder; use letters"),
        ("..", one_entry(), r"entry '\.\.': its name"),
        ("", one_entry(), r"entry '': its name"),
        ("checkpoints", one_entry(), r"entry 'checkpoints': the sweep itself writes"),
        ("sweep.json", one_entry(), r"entry 'sweep\.json': the sweep itself writes"),
    ],
)
def test_an_entry_that_does_not_fit_is_named_before_the_model_is_loaded(
    tmp_path, name, entry, message
):
    with pytest.raises(ValueError, match=message):
        SweepRunner(config(tmp_path / "out", model_name="./nowhere"), {name: entry})
    assert not (tmp_path / "out").exists()


def test_other_mistakes_are_named_before_the_model_is_loaded(swept):
    entries = expand({"x": {"k": 8}})
    nowhere = {"model_name": "./nowhere"}
    with pytest.raises(ValueError, match=r"entry 'x': d_in=64, but the sweep's sae\.d_in is 32"):
        SweepRunner(config(sae={"d_in": 32}, **nowhere), entries)
    with pytest.raises(ValueError, match="no entries: name at least one"):
        SweepRunner(config(**nowhere), {})
    with pytest.raises(ValueError, match=r"from_pretrained_path='y': a sweep starts every"):
        SweepRunner(config(from_pretrained_path="y", **nowhere), entries)
    with pytest.raises(ValueError, match=r"hard k=4.: already holds a run .*give another folder"):
        SweepRunner(config(swept[1], **nowhere), expand(FEW))


def test_blocks_are_held_against_the_model_where_it_decides_them(model):
    with pytest.raises(ValueError, match=r"entry 'x': blocks=\[2\] must .*\[3, 4, 5, 6, 7, 8, 9"):
        SweepRunner(config(routed_layers=None), {"x": one_entry(blocks=[2])}, None, model)


def test_a_table_is_not_written_over(model, tmp_path):
    (tmp_path / "sweep.json").write_text("[]")
    with pytest.raises(ValueError, match=r"already holds a run \(sweep\.json\)"):
        SweepRunner(config(tmp_path), expand(FEW), override_model=model)


def test_a_checkpoint_of_something_else_is_refused(model, tmp_path):
    entries = {"x": one_entry()}
    SweepRunner(config(tmp_path / "a", n_checkpoints=1), entries, override_model=model).run()
    (checkpoint,) = (tmp_path / "a" / "checkpoints").glob("*/*")
    cfg = config(model_name="./nowhere", resume_from_checkpoint=str(checkpoint))
    for changed, message in [
        ({"y": one_entry()}, "holds no entry 'y'; it has x"),
        ({"x": one_entry(k=4)}, "entry 'x' has k=8 there, not 4"),
        ({"x": one_entry(blocks=[3, 4, 5])}, r"blocks=\[3, 4, 5, 6, 7\] there, not \[3, 4, 5\]"),
        ({"x": one_entry(architecture="crosscoder_topk")}, "architecture='route_topk' there"),
    ]:
        with pytest.raises(ValueError, match=message):
            SweepRunner(cfg, changed)
    (checkpoint / "activations_store_state.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        SweepRunner(cfg, entries)


def test_memory_is_asked_for_before_anything_is_made(model):
    huge = replace(one_entry(), sae=replace(one_entry().sae, d_sae=10**9))
    with pytest.raises(ValueError, match=r"entries=2: would take [\d.]+ GB on cpu"):
        SweepRunner(config(), {"x": huge, "y": huge}, override_model=model)
    small = replace(one_entry(), sae=replace(one_entry().sae, d_sae=10**6))
    tokens = {"training_tokens": 10**9, "train_batch_size_tokens": 10**9}
    with pytest.raises(ValueError, match=r"train_batch_size_tokens=1000000000: would take"):
        SweepRunner(config(**tokens), {"x": small}, override_model=model)


def test_the_estimate_adds_up_the_dictionaries(model):
    runner = SweepRunner(config(), expand({"x": {"k": [4, 8, 16]}}), override_model=model)
    (one, *_), estimate = runner.saes.values(), runner.memory_estimate()
    weights = sum(p.numel() * p.element_size() for p in one.parameters())
    assert estimate["saes"] == pytest.approx(3 * 4 * weights, rel=0.05)
    # latents and pre-activations of all three, gradients of one; float32
    assert estimate["features"] == pytest.approx(4 * 64 * (96 + 64) * (3 * 2 + 2))
    assert sum(estimate.values()) < psutil.virtual_memory().available


def test_a_loss_of_nan_names_the_entry(model):
    runner = SweepRunner(config(lr=1e30), expand({"x": {"k": 8}}), override_model=model)
    with pytest.raises(ValueError, match=r"entry 'x': the loss is NaN .*without this entry"):
        runner.run()


# --- what is written -----------------------------------------------------------------------------


def test_entries_load_as_what_run_gave_back(entries, swept):
    saes, folder = swept
    for name, entry in entries.items():
        loaded = SAE.load_from_disk(folder / name)
        assert type(loaded) is type(saes[name])
        assert_same_bits(loaded, saes[name])
        metadata, blocks = loaded.cfg.metadata, entry.blocks or BLOCKS
        kind = "stack" if name.startswith("crosscoder") else "route"
        assert metadata.routed_layers == blocks
        assert metadata.hook_names == [f"blocks.{i}.hook_resid_post" for i in blocks]
        assert metadata.hook_name == f"blocks.{blocks[-1]}.hook_resid_{kind}"
        assert loaded.cfg.n_routed_layers == len(blocks)
        assert metadata.model_name == TINYLLAMA and metadata.exclude_special_tokens is True
        written = {path.name for path in (folder / name).iterdir()}
        assert written >= {"cfg.json", "sparsity.safetensors", "runner_cfg.json"}
    sparsity = load_file(folder / "plain topk" / "sparsity.safetensors")["sparsity"]
    assert (10**sparsity).sum() == pytest.approx(8, rel=1e-3)  # k of them per token


def test_the_log_has_every_entry(entries, swept):
    lines = (swept[1] / "train_log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert {record["name"] for record in records} == entries.keys()
    (last,) = [r for r in records if r["name"] == "hard k=4" and r["tokens"] == 64 * 12]
    assert last["step"] == 12 and last["l0"] == 4 and 0 < last["loss"] < 1


def test_wandb_gets_a_run_of_its_own(model):
    """WANDB_MODE is disabled here: it is called as SAELens calls it, and nothing is sent."""
    from sae_lens import LoggingConfig

    cfg = config(logger=LoggingConfig(log_to_wandb=True, wandb_log_frequency=2))
    saes = SweepRunner(cfg, expand({"hard": {"k": 8}}), override_model=model).run()
    assert torch.isfinite(saes["hard"].W_enc).all()


def test_labels_are_those_of_the_runs():
    entries = expand({"hard": {"k": [4, 8]}, "one": {"k": 4}}, seeds=[0, 1])
    named = {name: (entry.label, entry.sae.k, entry.seed) for name, entry in entries.items()}
    assert named == {
        "hard k=4 seed=0": ("hard", 4, 0),
        "hard k=4 seed=1": ("hard", 4, 1),
        "hard k=8 seed=0": ("hard", 8, 0),
        "hard k=8 seed=1": ("hard", 8, 1),
        "one seed=0": ("one", 4, 0),
        "one seed=1": ("one", 4, 1),
    }
    (penalty,) = expand({"x": {"architecture": "crosscoder", "l1_coefficient": [0.01]}}).items()
    assert penalty[0] == "x" and penalty[1].sae.l1_coefficient == 0.01


# --- the table -----------------------------------------------------------------------------------

TABLED = ("crosscoder", "hard k=4", "blocks with a gap", "plain topk", "soft", "uniform")


@pytest.fixture(scope="module")
def table(model, entries, swept):
    some = {name: entries[name] for name in TABLED}
    return evaluate_sweep(model, some, swept[0], "demo:heldout", max_tokens=64, batch_size=4)


def test_json_csv_and_parquet_hold_the_same_numbers(table, tmp_path):
    paths = table.write(tmp_path / "new")
    assert json.loads(paths[0].read_text()) == table.rows
    with paths[1].open() as file:
        from_csv = list(csv.DictReader(file))
    from_parquet = pq.read_table(paths[2]).to_pylist()
    assert len(table.rows) == len(from_csv) == len(from_parquet) == len(TABLED)
    for row, text, typed in zip(table.rows, from_csv, from_parquet, strict=True):
        flat = {}
        for key, value in row.items():
            if isinstance(value, list):
                flat |= {f"{key}_{i}": item for i, item in enumerate(value)}
            else:
                flat[key] = value
        assert text.keys() == typed.keys() >= flat.keys()
        for column in text:
            expected = flat.get(column)
            assert typed[column] == expected, column
            if isinstance(expected, str) or expected is None:
                assert text[column] == (expected or "")
            else:
                assert float(text[column]) == expected, column


def test_rows_say_what_was_trained(table, entries):
    by_name = {row["name"]: row for row in table.rows}
    assert list(by_name) == list(TABLED)
    hard, gap, plain = by_name["hard k=4"], by_name["blocks with a gap"], by_name["plain topk"]
    assert (hard["label"], hard["k"], hard["seed"], hard["d_sae"]) == ("hard", 4, 0, 96)
    assert hard["blocks"] == BLOCKS and gap["blocks"] == [4, 6] and plain["blocks"] == [5]
    assert hard["l0"] == 4 and hard["n_tokens"] == plain["n_tokens"] < 64
    assert (hard["routing"], by_name["uniform"]["routing"]) == ("hard", "uniform")
    assert by_name["soft"].get("kl") is None
    dictionary = 2 * 64 * 96 + 96 + 64
    assert hard["n_parameters"] == dictionary + 64 * 5
    assert plain["n_parameters"] == dictionary  # nothing to choose, so no router
    assert by_name["crosscoder"]["n_parameters"] == 2 * 5 * 64 * 96 + 96 + 5 * 64


def test_all_at_once_is_each_alone(model, swept, table):
    """Also for what reads other blocks than its neighbours, and draws layers of its own."""
    size = {"max_tokens": 64, "batch_size": 4}
    copies = {name: fresh(swept[0][name]) for name in TABLED}
    together = evaluate_all(model, copies, "demo:heldout", unscaled=True, **size)
    for name in TABLED:
        alone = evaluate(model, fresh(swept[0][name]), "demo:heldout", **size)
        assert_close(together[name].to_dict(), alone.to_dict())
    for row in table.rows[:-1]:  # the last one's generator went on drawing
        alone = evaluate_all(model, {"": swept[0][row["name"]]}, "demo:heldout", **size)[""]
        for metrics in alone.to_dict().values():
            for metric, value in (metrics or {}).items():
                assert_close(row[metric], value)


def fresh(sae):
    """A copy, which draws layers from the start again."""
    copied = type(sae)(sae.cfg)
    copied.load_state_dict(sae.state_dict())
    return copied
