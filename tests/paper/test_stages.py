"""Groups that fit in memory, decided once; an interrupted one resumes."""

import itertools
import json
from dataclasses import replace

import pytest
from support.small import small_config

from sae_lens_route.errors import UserError
from sae_lens_route.paper.methods import MLSAE, ROUTE, TOPK
from sae_lens_route.paper.plan import Run, sweep_entries
from sae_lens_route.paper.stages import GROUPS_FILENAME, groups_of
from sae_lens_route.training.sweep import SweepRunner, sweep_memory

RUNS = [Run(method.label, 8, seed) for method in (ROUTE, TOPK, MLSAE) for seed in (0, 1)]


@pytest.fixture
def planned(tmp_path, tinyllama):
    cfg = small_config(tmp_path, training_tokens=64 * 12, routed_blocks=[2, 5, 9])
    cfg.resolve(tinyllama)
    return cfg, sweep_entries(RUNS, cfg, {}, {})


def names(groups):
    return [[run.name for run in group.entries] for group in groups]


def bytes_of(cfg, entries):
    return sum(sweep_memory(cfg, {run.name: entry for run, entry in entries.items()}).values())


def test_a_group_is_as_large_as_memory_allows(planned, tmp_path):
    cfg, entries = planned
    budget = bytes_of(cfg, dict(list(entries.items())[:3]))
    groups = groups_of(tmp_path / "a", cfg, entries, budget)
    assert [run for group in groups for run in group.entries] == RUNS
    for group, following in itertools.pairwise(groups):
        more = {**group.entries, **dict([next(iter(following.entries.items()))])}
        assert bytes_of(cfg, more) > budget
    assert all(bytes_of(cfg, g.entries) <= budget or len(g.entries) == 1 for g in groups)
    assert len(groups) > 1 and len(groups_of(tmp_path / "b", cfg, entries, 10**12)) == 1
    assert [len(g.entries) for g in groups_of(tmp_path / "c", cfg, entries, 1)] == [1] * 6


def test_they_stay_what_they_were(planned, tmp_path):
    cfg, entries = planned
    first = groups_of(tmp_path, cfg, entries, bytes_of(cfg, dict(list(entries.items())[:2])))
    again = groups_of(tmp_path, cfg, entries, 10**12)
    assert names(again) == names(first) and [g.folder for g in again] == [g.folder for g in first]
    fewer = dict(list(entries.items())[1:])
    with pytest.raises(UserError, match="holds other dictionaries"):
        groups_of(tmp_path, cfg, fewer, 10**12)


def test_an_interrupted_group_resumes_and_groups_do_not_change_a_dictionary(
    planned, tmp_path, tinyllama, monkeypatch
):
    cfg, entries = planned
    cfg = replace(cfg, n_checkpoints=3)
    (whole,) = groups_of(tmp_path / "whole", cfg, entries, 10**12)
    expected = {run: sae.state_dict() for run, sae in whole.train(cfg, tinyllama).items()}

    two = bytes_of(cfg, dict(list(entries.items())[:2]))
    groups = groups_of(tmp_path / "parts", cfg, entries, two)
    assert len(groups) > 1
    finish = SweepRunner._finish

    def killed(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(SweepRunner, "_finish", killed)
    with pytest.raises(KeyboardInterrupt):
        groups[0].train(cfg, tinyllama)
    monkeypatch.setattr(SweepRunner, "_finish", finish)
    log_before = [record["step"] for record in groups[0].log()]
    for group in groups:
        for run, sae in group.train(cfg, tinyllama).items():
            for name, weights in sae.state_dict().items():
                assert weights.equal(expected[run][name]), (run, name)
    assert [record["step"] for record in groups[0].log()] == log_before
    monkeypatch.setattr(SweepRunner, "__init__", None)  # trained already: loaded from disk
    loaded = groups[0].train(cfg, tinyllama)
    assert list(loaded) == list(groups[0].entries)
    assert json.loads((tmp_path / "parts" / GROUPS_FILENAME).read_text()) == names(groups)
