"""Activations: those of the model, aligned, each token once, from no more blocks than needed."""

import json

import pytest
import torch
from datasets import Dataset
from small import TINYLLAMA, small_config, tokens_dataset

from sae_lens_route.activations import RoutedActivationsStore, load_text_dataset
from sae_lens_route.models import load_model


@pytest.fixture(scope="module")
def model():
    return load_model(TINYLLAMA)


def make_store(model, dataset=None, **changes):
    cfg = small_config(None, **changes)
    cfg.resolve(model)
    return RoutedActivationsStore.from_config(model, cfg, override_dataset=dataset)


def expected_rows(model, dataset, hook_names, excluded=(0, 1)):
    """All kept tokens' activations `[tokens, L, d]`, from full forward passes, in reading order."""
    rows = []
    contexts = torch.stack([torch.as_tensor(row) for row in dataset["tokens"]])
    for tokens in contexts.split(4):
        _, cache = model.run_with_cache(tokens)
        stacked = torch.stack([cache[name] for name in hook_names], dim=2)
        rows.append(stacked[~torch.isin(tokens, torch.tensor(excluded))])
    return torch.cat(rows)


def test_in_order_batches_are_the_models_activations_without_special_tokens(model):
    dataset = tokens_dataset()
    store = make_store(model, dataset, train_batch_size_tokens=50)
    expected = expected_rows(model, dataset, store.hook_names)
    batches = [next(store) for _ in range(len(expected) // 50)]
    assert all(batch.shape == (50, 9, 64) and batch.is_contiguous() for batch in batches)
    actual = torch.cat(batches)
    torch.testing.assert_close(actual, expected[: len(actual)], rtol=1e-5, atol=1e-5)


def test_special_tokens_are_kept_when_asked(model):
    dataset = tokens_dataset()
    store = make_store(model, dataset, exclude_special_tokens=False)
    expected = expected_rows(model, dataset, store.hook_names, excluded=())
    torch.testing.assert_close(next(store), expected[:64], rtol=1e-5, atol=1e-5)


def test_blocks_above_the_routed_ones_do_not_run(model):
    ran = []
    handles = [
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(model.blocks)
    ]
    handles.append(model.unembed.register_forward_hook(lambda *_: ran.append("unembed")))
    try:
        next(make_store(model, tokens_dataset(), train_batch_size_tokens=8))
    finally:
        for handle in handles:
            handle.remove()
    assert ran == list(range(12))


def test_shuffled_buffer_serves_every_token_once_before_any_twice(model, caplog):
    dataset = tokens_dataset(n_contexts=256)
    store = make_store(
        model,
        dataset,
        train_batch_size_tokens=32,
        activations_mixing_fraction=0.5,
        n_batches_in_buffer=4,
    )
    assert store.buffer_tokens == 4 * 4 * 16
    with caplog.at_level("INFO", logger="sae_lens"):
        batches = torch.cat([next(store) for _ in range(40)])
    assert "shuffle buffer: 256 tokens x 9 layers x 64" in caplog.text
    expected = expected_rows(model, dataset, store.hook_names)
    distance = torch.cdist(batches.flatten(1).double(), expected.flatten(1).double())
    served = distance.argmin(1)
    assert distance.min(1).values.max() < 1e-3
    assert len(served.unique()) == len(served)
    assert not torch.equal(served, served.sort().values)


def test_position_survives_a_checkpoint_exactly(model, tmp_path):
    dataset = tokens_dataset(n_contexts=64)
    store = make_store(model, dataset, train_batch_size_tokens=37)
    for _ in range(5):
        next(store)
    store.save_to_checkpoint(tmp_path)
    expected = [next(store) for _ in range(30)]  # goes past the end of the dataset
    resumed = make_store(model, dataset, train_batch_size_tokens=37)
    resumed.load_from_checkpoint(tmp_path)
    for batch in expected:
        assert torch.equal(batch, next(resumed))


def test_token_batches_end_with_the_text(model):
    store = make_store(model, tokens_dataset(n_contexts=10), train_batch_size_tokens=16)
    shapes = [tuple(tokens.shape) for tokens in store.token_batches(10**9)]
    assert shapes == [(4, 16), (4, 16), (2, 16)]


def test_a_dataset_too_short_for_a_step_is_refused_before_the_model_runs(model):
    with pytest.raises(ValueError, match=r"only 3 contexts of context_size=16.*needs 4"):
        make_store(model, tokens_dataset(n_contexts=3))
    with pytest.raises(ValueError, match="the dataset is empty"):
        make_store(model, Dataset.from_dict({"text": []}))


def test_nan_in_the_activations_is_named():
    broken = load_model(TINYLLAMA)
    with torch.no_grad():
        broken.blocks[5].mlp.W_out.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"blocks\.5\.hook_resid_post contain NaN"):
        next(make_store(broken, tokens_dataset()))


def test_a_buffer_that_does_not_fit_is_refused(model):
    store = make_store(
        model, tokens_dataset(), activations_mixing_fraction=0.5, n_batches_in_buffer=10**9
    )
    with pytest.raises(ValueError, match=r"n_batches_in_buffer=1000000000: would take .* GB"):
        next(store)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt"])
def test_local_files(tmp_path, suffix, streaming):
    texts = ["first text\nwith two lines", "second text"]
    if suffix == ".jsonl":
        lines = "\n".join(json.dumps({"text": text}) for text in texts)
        (tmp_path / "data.jsonl").write_text(lines)
    elif suffix == ".parquet":
        Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "data.parquet")
    else:
        for i, text in enumerate(texts):
            (tmp_path / f"{i}.txt").write_text(text)
    rows = list(load_text_dataset(str(tmp_path), streaming=streaming))
    assert [row["text"] for row in rows] == texts


def test_saved_dataset_and_demo(tmp_path):
    tokens_dataset().save_to_disk(str(tmp_path / "saved"))
    assert "tokens" in load_text_dataset(str(tmp_path / "saved")).column_names
    assert not set(load_text_dataset("demo")["text"]) & set(
        load_text_dataset("demo:heldout")["text"]
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", "no such file or folder"),
        ("nobody/nothing-here", "neither a local file or folder nor a dataset the Hub gives"),
    ],
)
def test_missing_datasets_are_named(path, message):
    with pytest.raises(ValueError, match=f"dataset_path='{path}': {message}"):
        load_text_dataset(path)


def test_a_folder_of_other_files_is_named(tmp_path):
    (tmp_path / "notes.pdf").write_text("")
    with pytest.raises(ValueError, match="holds no data files"):
        load_text_dataset(str(tmp_path))
