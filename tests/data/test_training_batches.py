"""Batches of passes from anywhere: how much text they read, and a cache before the model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_route.data.activation_shards import ActivationShards, Manifest
from sae_lens_route.data.cached_passes import CachedPasses
from sae_lens_route.data.kept_stream import ForwardPass
from sae_lens_route.data.training_batches import BatchLayout, TrainingBatches
from sae_lens_route.errors import UserError

CONTEXTS, ROWS, L, D = 2, 5, 3, 4


class Passes:
    """Pass n holds the numbers 100 n, 100 n + 1, ... in order; every second token is kept."""

    def __init__(self):
        self.n, self.made = 0, []

    def skip_to(self, n_contexts):
        assert n_contexts >= self.n * CONTEXTS  # only forwards
        self.n = n_contexts // CONTEXTS

    def next_pass(self):
        n, self.n = self.n, self.n + 1
        self.made.append(n)
        rows = 100.0 * n + torch.arange(2 * ROWS).view(-1, 1).expand(-1, D)
        return ForwardPass(
            [rows + i / 8 for i in range(L)], torch.arange(0, 2 * ROWS, 2), CONTEXTS * n
        )


def layout(batch_size, n_batches_in_buffer=1, kept_share=0.0):
    return BatchLayout(
        L,
        D,
        torch.float32,
        torch.device("cpu"),
        batch_size,
        ROWS,
        n_batches_in_buffer,
        kept_share,
        0,
    )


@settings(max_examples=60, deadline=None)
@given(
    batch_size=st.integers(1, 12),
    n_buffer=st.integers(3, 9),
    kept_share=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    n_batches=st.integers(1, 20),
)
def test_the_tokens_that_batches_read_are_counted(batch_size, n_buffer, kept_share, n_batches):
    shape = layout(batch_size, n_buffer, kept_share)
    batches = TrainingBatches(Passes(), shape)
    served = iter(batches)
    for _ in range(n_batches):
        next(served)
    first_context, n_used = batches._stream.position
    assert shape.tokens_read(n_batches) == first_context // CONTEXTS * ROWS + n_used


def cache(folder, per_shard=2):
    manifest = Manifest({}, "", None, [2, 5, 9], ["x", "y", "z"], 12, D, "float32", "exact")
    return ActivationShards(folder, manifest, per_shard)


def test_passes_are_computed_once_and_those_that_are_skipped_too(tmp_path):
    live, expected = Passes(), Passes()
    shards = cache(tmp_path)
    passes = CachedPasses(shards, [0, 2], CONTEXTS, live)
    passes.skip_to(3 * CONTEXTS)  # a run that resumes after the cache was lost from pass 0 on
    found = passes.next_pass()
    assert live.made == [0, 1, 2, 3] and shards.n_passes == 4
    again = CachedPasses(shards, [0, 2], CONTEXTS, live)
    for n in range(6):
        source, read = expected.next_pass(), again.next_pass()
        assert read.first_context == source.first_context == n * CONTEXTS
        for position, stream in zip([0, 2], read.streams, strict=True):
            assert torch.equal(stream[read.kept], source.streams[position][source.kept])
        if n == 3:
            assert all(torch.equal(a, b) for a, b in zip(read.streams, found.streams, strict=True))
    assert live.made == [0, 1, 2, 3, 4, 5]


def test_without_a_model_the_end_of_a_cache_is_an_error(tmp_path):
    passes = CachedPasses(cache(tmp_path), [0], CONTEXTS)
    with pytest.raises(UserError, match="ends after 0 passes; a run that needs more"):
        passes.next_pass()
