"""The features to look at first, against a sort of plain tuples."""

import pytest
import torch
from support.contexts import collect, random_stream
from support.selection import to_look_at_first

from sae_lens_route.errors import UserError
from sae_lens_route.features.selection import features_to_show, n_dense, summary
from sae_lens_route.features.table import ContextOptions

OPTIONS = ContextOptions(threshold=0.5)


@pytest.fixture(scope="module")
def stream():
    """1,440 tokens; by falling density: 6 dense features, 3 in between, 3 that rarely fire."""
    tokens, _, route, weight, kept = random_stream()
    generator = torch.Generator().manual_seed(1)
    n_active = [700, 500, 300, 200, 150, 145, 144, 60, 16, 15, 8, 6]
    acts = torch.zeros(len(n_active), tokens.numel())
    for row, n in zip(acts, n_active, strict=True):
        row[torch.randperm(len(row), generator=generator)[:n]] = (
            torch.rand(n, generator=generator) ** 3 * 4 + 0.1
        )
    return tokens, acts.T.reshape(*tokens.shape, -1), route, weight, kept


def test_the_order(stream):
    table = collect(stream, OPTIONS, [7])
    acts, n_kept = stream[1].numpy(), stream[0].numel()
    expected = to_look_at_first(acts, n_kept, table.interpretable)
    assert features_to_show(table, 99) == expected
    assert features_to_show(table, 4) == expected[:4]
    assert {*expected[:3]} == {6, 7, 8} and {*expected[-6:]} == {*range(6)}
    assert expected != sorted(expected, key=lambda f: -acts[..., f].max())
    assert n_dense(table) == 6


def test_excluded_tokens_do_not_count(stream):
    """Twice as many kept tokens, half of them excluded, change nothing."""
    tokens, acts, route, weight, kept = stream
    doubled = [torch.cat([part, part]) for part in (tokens, acts, route, weight)]
    table = collect((*doubled, torch.cat([kept, ~kept])), OPTIONS, [7])
    assert features_to_show(table, 99) == features_to_show(collect(stream, OPTIONS, [7]), 99)


def test_the_summary_has_the_strongest_tokens_of_the_first_features(stream):
    table = collect(stream, OPTIONS, [7])
    lines = summary(table).splitlines()
    first = features_to_show(table, 1)[0]
    profile, acts = table.profile(first), stream[1][..., first]
    assert lines[0] == f"threshold 0.500: {len(table.interpretable)} interpretable features"
    assert lines[1] == "6 dense features, active on more than 10% of the tokens"
    assert "units of n(x)" in lines[3]
    number, density, largest, mean, block = lines[5].split()[:5]
    assert int(number) == first and density == f"{float((acts > 0).double().mean()):.2%}"
    assert (largest, mean) == (f"{acts.max():.2f}", f"{acts[acts > 0].mean():.2f}")
    assert block == f"{profile.mean_block:.1f}"
    assert repr(table.contexts_of(first)[0].token) in lines[5]
    assert len(lines) == 5 + min(10, len(table.interpretable))


def test_a_table_without_interpretable_features(stream):
    table = collect(stream, ContextOptions(threshold=1e3), [7])
    assert len(summary(table).splitlines()) == 2
    with pytest.raises(UserError, match="no interpretable features"):
        features_to_show(table, 3)
