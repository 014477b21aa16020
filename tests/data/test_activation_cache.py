"""What a cache depends on, and runs that train on it: the same bits, without a model."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE
from support.killed import checkpoints_of, killed_at
from support.small import TINYLLAMA, small_config, tokens_dataset
from support.sweep import FEW, assert_same_bits, sized_entries, sweep_settings

from sae_lens_route.data.activation_cache import ActivationCache, model_files, write_cache
from sae_lens_route.data.activation_shards import read_manifest
from sae_lens_route.errors import UserError
from sae_lens_route.models.load import load_model
from sae_lens_route.training.runner import RouteSAETrainingRunner
from sae_lens_route.training.sweep import SweepRunner

BLOCKS = [2, 5, 9]
SHUFFLED = {"activations_mixing_fraction": 0.5, "n_batches_in_buffer": 4}


def config(cache: Path | None, output: Path | None = None, **changes):
    cache_activations = None if cache is None else str(cache)
    fields = {"routed_blocks": BLOCKS, "cache_activations": cache_activations, **changes}
    return small_config(output, **fields)


def trained(cfg, **options):
    return RouteSAETrainingRunner(cfg, **options).run()


@pytest.fixture
def no_model(monkeypatch):
    """Loading a language model is an error."""

    def fail(*_):
        raise AssertionError("the language model was loaded")

    return lambda: monkeypatch.setattr(RouteSAETrainingRunner, "_load_model", fail)


@pytest.mark.parametrize("more", [{}, SHUFFLED, {"prefetch_llm_batches": 3}])
def test_the_writing_run_and_one_from_the_cache_have_the_same_weights(tmp_path, no_model, more):
    plain = trained(config(None, **more))
    writer = trained(config(tmp_path / "cache", **more))
    assert_same_bits(plain, writer)
    no_model()
    assert_same_bits(plain, trained(config(tmp_path / "cache", **more)))
    # other settings of the training, fewer blocks
    other = config(tmp_path / "cache", **more, sae={"k": 4}, lr=1e-3)
    assert not torch.equal(trained(other).W_enc, plain.W_enc)


def test_fewer_blocks_are_read_from_a_cache_of_more(tmp_path, no_model):
    trained(config(tmp_path / "cache"))
    few = trained(config(None, routed_blocks=[5, 9]))
    no_model()
    assert_same_bits(few, trained(config(tmp_path / "cache", routed_blocks=[5, 9])))


def test_int8_trains_the_same_whether_the_cache_was_there_or_not(tmp_path, no_model):
    exact = trained(config(None))
    writer = trained(config(tmp_path / "cache", cache_dtype="int8"))
    no_model()
    reader = trained(config(tmp_path / "cache", cache_dtype="int8"))
    assert_same_bits(writer, reader)
    assert not torch.equal(exact.W_enc, reader.W_enc)
    torch.testing.assert_close(exact.W_enc, reader.W_enc, atol=0.01, rtol=0)


def test_a_longer_run_goes_on_where_the_cache_ends(tmp_path, no_model):
    longer = {"training_tokens": 16 * 4 * 20}
    trained(config(tmp_path / "cache"))
    n_passes = ActivationCache(config(tmp_path / "cache")).shards().n_passes
    plain = trained(config(None, **longer))
    assert_same_bits(plain, trained(config(tmp_path / "cache", **longer)))
    assert ActivationCache(config(tmp_path / "cache")).shards().n_passes > n_passes
    no_model()
    assert_same_bits(plain, trained(config(tmp_path / "cache", **longer)))


def test_a_sweep_trains_from_the_cache(tmp_path, tinyllama, no_model):
    entries = sized_entries(FEW)
    plain = SweepRunner(sweep_settings(), entries, None, tinyllama).run()
    cached = {"cache_activations": str(tmp_path / "cache")}
    SweepRunner(sweep_settings(**cached), entries).run()
    no_model()
    found = SweepRunner(sweep_settings(**cached), entries).run()
    for name in entries:
        assert_same_bits(plain[name], found[name])


def test_the_command_writes_what_a_run_reads(tmp_path, tinyllama, no_model):
    plain = trained(config(None))
    shards = write_cache(config(tmp_path / "cache"), tinyllama)
    assert shards.manifest.n_rows >= 16 * 4 * 12
    again = write_cache(config(tmp_path / "cache"), tinyllama)
    assert again.manifest.n_rows == shards.manifest.n_rows
    no_model()
    assert_same_bits(plain, trained(config(tmp_path / "cache")))


def test_a_run_without_a_model_resumes_and_may_change_over(tmp_path, no_model):
    """Checkpoints of runs with and without the language model are the same."""
    options = {**SHUFFLED, "n_checkpoints": 2}
    whole = trained(config(None, tmp_path / "whole", **options))
    trained(config(tmp_path / "cache", **SHUFFLED))
    trained(config(None, tmp_path / "live", **options))
    no_model()
    trained(config(tmp_path / "cache", tmp_path / "cached", **options))
    for run in ("live", "cached"):
        first = checkpoints_of(tmp_path / run)[0]
        cfg = config(tmp_path / "cache", resume_from_checkpoint=str(first), **SHUFFLED)
        assert_same_bits(whole, trained(cfg))


def test_a_killed_run_loses_no_whole_shard_and_resumes(tmp_path):
    code = (
        "from sae_lens_route.data import activation_shards\n"
        "from support.small import small_config\n"
        "activation_shards.SHARD_BYTES = 1  # a shard for every pass\n"
        f"options = {{'routed_blocks': {BLOCKS}, 'n_checkpoints': 5}}\n"
        "cfg = small_config(folder / 'run', cache_activations=str(folder / 'cache'), **options)\n"
        "module.RouteSAETrainingRunner(cfg).run()"
    )
    killed_at(code, tmp_path, 7)
    manifest = read_manifest(tmp_path / "cache")
    assert manifest is not None and len(manifest.shards) >= 7
    resumed = config(tmp_path / "cache", tmp_path / "run", n_checkpoints=5)
    resumed.resume_from_checkpoint = str(tmp_path / "run")
    assert_same_bits(trained(resumed), trained(config(None)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_size": 8, "store_batch_size_prompts": 8}, "context_size=16, this run has 8"),
        ({"seqpos_slice": (1, None)}, "seqpos_slice"),
        ({"exclude_special_tokens": False}, "exclude_special_tokens=True, this run has False"),
        ({"cache_dtype": "int8"}, "cache_dtype='exact', this run has 'int8'"),
        ({"autocast_lm": True}, "autocast_lm"),
        ({"dataset_path": "demo:heldout"}, "text="),
    ],
)
def test_the_activations_of_another_run_are_refused_by_field(tmp_path, changes, message):
    trained(config(tmp_path / "cache"))
    with pytest.raises(UserError, match=f"cache_activations=.*was written with {message}"):
        RouteSAETrainingRunner(config(tmp_path / "cache", **changes))


def test_another_text_or_model_is_refused(tmp_path, no_model):
    model = load_model(TINYLLAMA)
    text = tokens_dataset(256)
    other = Dataset.from_dict({"tokens": [row[::-1] for row in text["tokens"]]})
    trained(config(tmp_path / "cache"), override_dataset=text, override_model=model)
    with pytest.raises(UserError, match="was written with text="):
        RouteSAETrainingRunner(config(tmp_path / "cache"), other, model)
    model.blocks[0].mlp.W_in.data[0, 0] += 1e-3
    with pytest.raises(UserError, match="was written with weights="):
        RouteSAETrainingRunner(config(tmp_path / "cache"), text, model)


def test_blocks_that_are_not_there_are_named(tmp_path):
    trained(config(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"holds blocks \[2, 5, 9\], not .*blocks\.3"):
        RouteSAETrainingRunner(config(tmp_path / "cache", routed_blocks=[2, 3]))
    longer = {"training_tokens": 16 * 4 * 40, "routed_blocks": [2, 5]}
    with pytest.raises(UserError, match="only a run over the same blocks can write more"):
        RouteSAETrainingRunner(config(tmp_path / "cache", **longer))


def test_the_identity_of_a_folder_is_its_content(tmp_path):
    source, copy = Path(TINYLLAMA), tmp_path / "copy"
    copy.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    one, two = (small_config(None, model_name=str(folder)) for folder in (source, copy))
    assert model_files(one) == model_files(two) is not None
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert model_files(one) != model_files(two)


def test_saelens_own_cache_is_refused():
    with pytest.raises(UserError, match="SAELens's cache holds one block"):
        small_config(None, use_cached_activations=True)


def test_a_run_from_the_cache_saves_the_same_sae(tmp_path, no_model):
    trained(config(None, tmp_path / "plain"))
    trained(config(tmp_path / "cache"))
    no_model()
    trained(config(tmp_path / "cache", tmp_path / "cached"))
    plain, cached = (SAE.load_from_disk(tmp_path / name) for name in ("plain", "cached"))
    assert_same_bits(plain, cached)
    assert plain.cfg.to_dict() == cached.cfg.to_dict()
