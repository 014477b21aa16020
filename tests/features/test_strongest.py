"""The strongest contexts do not depend on how the stream is cut, in memory of a fixed size."""

from unittest.mock import patch

import pytest
from support.contexts import TOKENIZER, collect, random_stream
from support.feature_tables import BLOCKS, HOOKS

from sae_lens_route.features import strongest
from sae_lens_route.features.contexts import ContextCollector
from sae_lens_route.features.table import ContextOptions


@pytest.mark.parametrize("cap", [9, 256])
@pytest.mark.parametrize("sentences", ["decoded", "raw_tokens"])
def test_same_result_however_the_stream_is_cut(sentences, cap):
    options = ContextOptions(threshold=0.5, max_contexts_per_feature=cap, sentences=sentences)
    whole = collect(random_stream(), options, [60])
    for sizes in ([1], [7], [3, 20, 1]):
        for min_queue in (1, 200):
            other = collect(random_stream(), options, sizes, min_queue)
            assert other.features.equals(whole.features)
            if sentences == "raw_tokens" and cap < 256:
                continue  # equal activations at the cap: any of the equal contexts may stay
            if sentences == "raw_tokens":  # contexts with equal text are one to the reference
                columns = ["feature", "token_class", "activation", "text"]
                assert other.contexts.select(columns).equals(whole.contexts.select(columns))
            else:
                assert other.contexts.equals(whole.contexts)
                assert other.run == whole.run


def test_table_stays_within_its_bound():
    options = ContextOptions(threshold=0.0, max_contexts_per_feature=6)
    with patch.object(strongest, "MIN_QUEUE", 100):
        collector = ContextCollector(4, 12, BLOCKS, HOOKS, TOKENIZER, options)
        rows, batch = collector.strongest, 4 * 24 * 12
        for seed in range(20):
            collector.add(*random_stream(n=4, seed=seed))
            assert len(rows._store) <= rows.max_rows == 12 * 6
            assert rows.n_rows <= rows.max_rows + 100 + batch
    table = collector.table()
    assert rows.n_rows <= rows.max_rows
    assert table.contexts.num_rows <= rows.max_rows
    assert strongest.CANDIDATE.itemsize == 42  # as the module says
    columns = (rows.pair, rows.activation, rows._slot, rows._store)
    assert sum(column.itemsize for column in columns) == 4 * 64 + 42


def test_the_queue_of_rare_candidates_is_bounded():
    options = ContextOptions(threshold=2.5)
    with patch.object(strongest, "MAX_QUEUE_TOKENS", 500):
        collector = ContextCollector(4, 12, BLOCKS, HOOKS, TOKENIZER, options)
        for seed in range(20):
            collector.add(*random_stream(n=4, seed=seed))
            assert collector.strongest._queue.n_tokens < 500
    assert collector.table().contexts.num_rows
