"""A position is refused on another text than the one that was read up to it."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.small import small_config, tokens_dataset

from sae_lens_route.data.activations import RoutedActivationsStore
from sae_lens_route.data.row_digest import RowDigest
from sae_lens_route.errors import UserError
from sae_lens_route.training.checkpoint import newest_checkpoint
from sae_lens_route.training.runner import RouteSAETrainingRunner

BUFFERS = {
    "in order": {"activations_mixing_fraction": 0.0},
    "shuffled": {"activations_mixing_fraction": 0.5, "n_batches_in_buffer": 2},
}
TEXTS = [f"a text with the number {i} and some more words in it" for i in range(60)]
FEW = TEXTS[:15]


def store_on(model, dataset, **options):
    cfg = small_config(None, **options)
    cfg.resolve(model)
    return RoutedActivationsStore.from_config(model, cfg, override_dataset=dataset)


def changed(rows, i):
    return [*rows[:i], rows[i - 1], *rows[i + 1 :]]


def read_from(store, state):
    store.load_state(state)
    return next(store)


@pytest.mark.parametrize("options", BUFFERS.values(), ids=BUFFERS)
@pytest.mark.parametrize("column", ["text", "tokens"])
def test_every_row_that_was_read_has_to_be_the_same(tinyllama, options, column):
    rows = TEXTS if column == "text" else tokens_dataset(40)["tokens"]
    store = store_on(tinyllama, Dataset.from_dict({column: rows}), **options)
    while store._n_sequences < 16:
        next(store)
    state, last = store.state_dict(), store.n_dataset_processed  # the row that is being read
    assert last == 15 or column == "text"
    following = next(store)
    for i in (1, last - 1, last):
        other = Dataset.from_dict({column: changed(rows, i)})
        with pytest.raises(UserError, match="are not those that the interrupted run has read"):
            read_from(store_on(tinyllama, other, **options), state)
    other = Dataset.from_dict({column: changed(rows, last + 10)}).to_iterable_dataset()
    assert torch.equal(read_from(store_on(tinyllama, other, **options), state), following)


@pytest.mark.parametrize("wrong", [FEW[:-1], [*FEW, FEW[0]], FEW[::-1]])
def test_later_epochs_are_compared_too(tinyllama, wrong):
    store = store_on(tinyllama, Dataset.from_dict({"text": FEW}))
    while store.n_dataset_processed < 2.5 * len(FEW):
        next(store)
    state = store.state_dict()
    with pytest.raises(UserError, match="are not those that the interrupted run has read"):
        store_on(tinyllama, Dataset.from_dict({"text": wrong})).load_state(state)
    store_on(tinyllama, Dataset.from_dict({"text": FEW})).load_state(state)


def test_positions_of_earlier_versions_are_not_compared(tinyllama):
    store = store_on(tinyllama, Dataset.from_dict({"text": TEXTS}))
    next(store)
    state = {k: v for k, v in store.state_dict().items() if not k.startswith("digest")}
    store_on(tinyllama, Dataset.from_dict({"text": TEXTS[::-1]})).load_state(state)


def test_what_a_row_is_stored_as_does_not_count():
    def digest(*rows):
        digest = RowDigest()
        for row in rows:
            digest.add(row)
        return bytes(digest.state(1)["digest_sha256"].tolist())

    ids = [3, 1, 2]
    same = {digest(x) for x in (ids, np.array(ids, np.int32), torch.tensor(ids))}
    assert len(same) == 1
    different = [digest("ab", "c"), digest("a", "bc"), digest("abc"), digest("abc", ""), digest()]
    assert len(set(different)) == len(different)
    assert digest("\ud800") != digest("?")


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_another_text_after_the_first_contexts_is_refused(tinyllama, tmp_path, fraction):
    """As far as the run had read: 30 of 60 rows in order, with a shuffle buffer some more."""
    rows = tokens_dataset(60)["tokens"]
    options = {
        "activations_mixing_fraction": fraction,
        "n_batches_in_buffer": 2,
        "n_checkpoints": 1,
    }
    data = Dataset.from_dict({"tokens": rows})
    RouteSAETrainingRunner(small_config(tmp_path / "a", **options), data, tinyllama).run()
    checkpoint = str(newest_checkpoint(tmp_path / "a"))
    cfg = small_config(tmp_path / "b", resume_from_checkpoint=checkpoint, **options)
    other = Dataset.from_dict({"tokens": [*rows[:20], rows[0], *rows[21:]]})
    with pytest.raises(UserError, match="are not those that the interrupted run has read"):
        RouteSAETrainingRunner(cfg, other, tinyllama).run()
