"""The training stream: aligned activations of the model, each kept token once."""

import itertools

import pytest
import torch
from datasets import Dataset, IterableDataset
from support.small import TINYLLAMA, TINYLLAMA_SPECIAL, small_config, tokens_dataset

from sae_lens_route.data.activations import RoutedActivationsStore
from sae_lens_route.errors import UserError
from sae_lens_route.models.load import load_model


def make_store(model, dataset=None, **changes):
    cfg = small_config(None, **changes)
    cfg.resolve(model)
    return RoutedActivationsStore.from_config(model, cfg, override_dataset=dataset)


def expected_rows(model, dataset, hook_names, excluded=TINYLLAMA_SPECIAL):
    """All kept tokens' activations `[tokens, L, d]`, from full forward passes, in reading order."""
    rows = []
    contexts = torch.stack([torch.as_tensor(row) for row in dataset["tokens"]])
    for tokens in contexts.split(4):
        _, cache = model.run_with_cache(tokens)
        stacked = torch.stack([cache[name] for name in hook_names], dim=2)
        rows.append(stacked[~torch.isin(tokens, torch.tensor(excluded))])
    return torch.cat(rows)


def test_in_order_batches_are_the_models_activations_without_special_tokens(tinyllama):
    dataset = tokens_dataset()
    store = make_store(tinyllama, dataset, train_batch_size_tokens=50)
    expected = expected_rows(tinyllama, dataset, store.hook_names)
    batches = [next(store) for _ in range(len(expected) // 50)]
    assert all(batch.shape == (50, 9, 64) and batch.is_contiguous() for batch in batches)
    actual = torch.cat(batches)
    torch.testing.assert_close(actual, expected[: len(actual)], rtol=1e-5, atol=1e-5)


def test_special_tokens_are_kept_when_asked(tinyllama):
    dataset = tokens_dataset()
    store = make_store(tinyllama, dataset, exclude_special_tokens=False)
    expected = expected_rows(tinyllama, dataset, store.hook_names, excluded=())
    torch.testing.assert_close(next(store), expected[:64], rtol=1e-5, atol=1e-5)


def test_blocks_above_the_routed_ones_do_not_run(tinyllama):
    ran = []
    handles = [
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(tinyllama.blocks)
    ]
    handles.append(tinyllama.unembed.register_forward_hook(lambda *_: ran.append("unembed")))
    try:
        next(make_store(tinyllama, tokens_dataset(), train_batch_size_tokens=8))
    finally:
        for handle in handles:
            handle.remove()
    assert ran == list(range(12))


def test_shuffled_buffer_serves_every_token_once_before_any_twice(tinyllama, caplog):
    dataset = tokens_dataset(n_contexts=256)
    store = make_store(
        tinyllama,
        dataset,
        train_batch_size_tokens=32,
        activations_mixing_fraction=0.5,
        n_batches_in_buffer=4,
    )
    assert store.layout.buffer_tokens == 4 * 4 * 16
    with caplog.at_level("INFO", logger="sae_lens"):
        batches = torch.cat([next(store) for _ in range(40)])
    assert "shuffle buffer: 256 tokens x 9 blocks x 64" in caplog.text
    expected = expected_rows(tinyllama, dataset, store.hook_names)
    distance = torch.cdist(batches.flatten(1).double(), expected.flatten(1).double())
    served = distance.argmin(1)
    assert distance.min(1).values.max() < 1e-3
    assert len(served.unique()) == len(served)
    assert not torch.equal(served, served.sort().values)


def test_position_survives_a_checkpoint_exactly(tinyllama, tmp_path):
    dataset = tokens_dataset(n_contexts=64)
    store = make_store(tinyllama, dataset, train_batch_size_tokens=37)
    for _ in range(5):
        next(store)
    store.save_to_checkpoint(tmp_path)
    expected = [next(store) for _ in range(30)]  # goes past the end of the dataset
    resumed = make_store(tinyllama, dataset, train_batch_size_tokens=37)
    resumed.load_from_checkpoint(tmp_path)
    for batch in expected:
        assert torch.equal(batch, next(resumed))


def test_token_batches_end_with_the_text(tinyllama):
    store = make_store(tinyllama, tokens_dataset(n_contexts=10), train_batch_size_tokens=16)
    shapes = [tuple(tokens.shape) for tokens in store.token_batches(10**9)]
    assert shapes == [(4, 16), (4, 16), (2, 16)]


def test_a_dataset_too_short_for_a_step_is_refused_before_the_model_runs(tinyllama):
    with pytest.raises(UserError, match=r"only 3 contexts of context_size=16.*needs 4"):
        make_store(tinyllama, tokens_dataset(n_contexts=3))
    with pytest.raises(UserError, match="the dataset is empty"):
        make_store(tinyllama, Dataset.from_dict({"text": []}))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Dataset.from_dict({"words": ["a"] * 9}), "must have a 'tokens', 'input_ids', 'text'"),
        (tokens_dataset(context_size=8), "has context_size 8, but the provided context_size is 16"),
    ],
)
def test_a_dataset_that_saelens_refuses_is_a_mistake_of_the_user(tinyllama, dataset, message):
    with pytest.raises(UserError, match=f"the dataset cannot be read: .*{message}"):
        make_store(tinyllama, dataset)


def test_a_rule_that_keeps_no_token_is_refused(tinyllama):
    with pytest.raises(UserError, match="no token of the first 4 contexts is kept"):
        make_store(tinyllama, tokens_dataset(), exclude_special_tokens=list(range(512)))


def test_a_text_that_goes_on_without_a_kept_token_is_given_up(tinyllama):
    """An endless loop otherwise: from some context on there is only padding."""

    def generate():
        yield from ({"tokens": [0] + [5] * 15} for _ in range(4))
        yield from ({"tokens": [0] + [1] * 15} for _ in itertools.count())

    store = make_store(tinyllama, IterableDataset.from_generator(generate))
    with pytest.raises(UserError, match="none of the tokens of 1000 batches of contexts"):
        for _ in range(3):
            next(store)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("text", None, "column 'text' holds None, not text"),
        ("text", 3.5, r"column 'text' holds 3\.5, not text"),
        ("tokens", [0, 1.5] * 8, "not token ids"),
        ("tokens", [0, 512] * 8, "holds the token id 512, but the model has ids 0 to 511"),
        ("tokens", [0, -1] * 8, "holds the token id -1, but"),
        ("tokens", [0, 3], "has 2 token ids, fewer than context_size=16"),
        ("input_ids", [0, 600] * 8, "column 'input_ids' holds the token id 600"),
    ],
)
@pytest.mark.parametrize("row", [0, 20])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_that_cannot_be_read_is_named(tinyllama, column, value, message, row, streaming):
    """At once where it is the first; when it is read where it is a later one."""
    good = "some words in a row " * 5 if column == "text" else list(range(16))
    rows = [good] * 40
    rows[row] = value
    if isinstance(value, float) or (isinstance(value, list) and isinstance(value[1], float)):
        rows = [[float(x) for x in r] if isinstance(r, list) else 3.5 for r in rows]  # one type
        row = 0

    def generate():
        yield from ({column: each} for each in rows)

    dataset = (
        IterableDataset.from_generator(generate) if streaming else Dataset.from_dict({column: rows})
    )
    short = column != "text" and value is not None and row == 0 and len(value) == 2
    expected = "has context_size 2, but" if short else f"row {row}: .*{message}"
    with pytest.raises(UserError, match=expected):
        store = make_store(tinyllama, dataset)
        while store.n_dataset_processed < 39:
            next(store)


def test_an_error_of_the_reader_names_the_row(tinyllama):
    def generate():
        for i in range(30):
            if i == 25:
                raise ConnectionError("the hub is gone")
            yield {"tokens": list(range(16))}

    store = make_store(tinyllama, IterableDataset.from_generator(generate))
    with pytest.raises(UserError, match=r"row 25 cannot be read \(ConnectionError: the hub is g"):
        for _ in range(30):
            next(store)


def test_another_stream_on_the_same_text_leaves_the_first_alone(tinyllama):
    store, twin = (make_store(tinyllama, tokens_dataset()) for _ in range(2))
    first = next(store)
    other = store.from_the_start()
    assert torch.equal(next(other), first)
    next(twin)
    for _ in range(5):
        next(other)
        assert torch.equal(next(store), next(twin))


@pytest.mark.parametrize("n_batches", [0, 1, 2, 5, 6, 7, 23])
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9])
def test_a_shuffle_buffer_is_made_again_from_its_position(tinyllama, fraction, n_batches):
    options = {"activations_mixing_fraction": fraction, "n_batches_in_buffer": 4}
    options |= {"train_batch_size_tokens": 24}
    dataset = tokens_dataset(n_contexts=70)  # several epochs
    store = make_store(tinyllama, dataset, **options)
    for _ in range(n_batches):
        next(store)
    state = {name: value.clone() for name, value in store.state_dict().items()}
    resumed = make_store(tinyllama, dataset, **options)
    resumed.load_state(state)
    for name, value in resumed.state_dict().items():
        assert name == "n_dataset_processed" or torch.equal(value, state[name]), name
    for _ in range(20):
        assert torch.equal(next(store), next(resumed))


def test_nan_in_the_activations_is_named():
    broken = load_model(TINYLLAMA)
    with torch.no_grad():
        broken.blocks[5].mlp.W_out.fill_(float("nan"))
    with pytest.raises(UserError, match=r"blocks\.5\.hook_resid_post contain NaN"):
        next(make_store(broken, tokens_dataset()))


def test_a_buffer_that_does_not_fit_is_refused(tinyllama):
    store = make_store(
        tinyllama, tokens_dataset(), activations_mixing_fraction=0.5, n_batches_in_buffer=10**9
    )
    with pytest.raises(UserError, match=r"n_batches_in_buffer=1000000000: would take .* GB"):
        next(store)
