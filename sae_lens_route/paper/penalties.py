"""The penalty with which a method without k has a given L0, found by trial on training text.

All methods are searched in one sweep a round. The first rounds go up or down from where a method's
search begins until the wanted L0 lie between those found; the last trains at what interpolation
says. An L0 is the mean over the last quarter of a run, on text that is trained on once: held-out
text is not looked at.

Trials are as long as the runs they are for. In shorter ones ReLU and gated SAEs have not come down
to their L0: with a quarter of the demo's steps, 53 to 83 features were active at every coefficient
from .375 to 76.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from sae_lens_route.config import RouteSAERunnerConfig
from sae_lens_route.models.kinds import LanguageModel
from sae_lens_route.paper.methods import METHODS, Method
from sae_lens_route.paper.plan import Penalties, Reproduction, Run, sweep_entry, target_of
from sae_lens_route.paper.stages import cached, groups_of

_FACTORS = (0.4, 1.0, 2.5)
"""Of the first penalty, in the first round."""
_STEP = 3.0
"""Factor of the next penalty outside those tried."""
_ROUNDS = 4
"""Rounds in which the wanted L0 may be looked for."""
_LEAST_L0 = 0.01


class Trial(NamedTuple):
    """A run of one method."""

    method: str
    penalty: float
    l0: float
    """Active features per token at its end."""


def find_penalties(reproduction: Reproduction, model: LanguageModel) -> Penalties:
    """The penalties of all methods without k, for every k of the reproduction.

    `penalties.json` in its folder holds all that was tried; an earlier run's is read.
    """
    path = reproduction.output / "penalties.json"
    trials = cached(path, list[Trial], lambda: _search(reproduction, model))
    return {
        (method.label, k): penalty_at([t for t in trials if t.method == method.label], float(k))
        for method in METHODS
        if method.first_penalty is not None
        for k in _ks(reproduction)
    }


def penalty_at(trials: Sequence[Trial], l0: float) -> float:
    """The penalty that gives an L0, by linear interpolation of the logarithms.

    Between the two trials next to it, or from the two nearest if it is beyond them all, but not
    further out than the search's next step.

    Args:
        trials: Of one method, two at least with different penalties.
        l0: The wanted one.
    """
    points = sorted((math.log(t.penalty), math.log(max(t.l0, _LEAST_L0))) for t in trials)
    wanted = math.log(l0)
    pairs = list(itertools.pairwise(points))
    around = [pair for pair in pairs if pair[0][1] >= wanted >= pair[1][1]]
    nearest = min(pairs, key=lambda pair: sum(abs(y - wanted) for _, y in pair))
    (x, y), (next_x, next_y) = around[0] if around else nearest
    found = x if next_y == y else x + (wanted - y) * (next_x - x) / (next_y - y)
    step = math.log(_STEP)
    return math.exp(min(max(found, points[0][0] - step), points[-1][0] + step))


def next_penalties(trials: Sequence[Trial], ks: Sequence[int]) -> list[float]:
    """Penalties outside those tried, where the wanted L0 are not between those found."""
    found, tried = ([getattr(t, name) for t in trials] for name in ("l0", "penalty"))
    lower = [min(tried) / _STEP] if max(found) < max(ks) else []
    return lower + ([max(tried) * _STEP] if min(found) > min(ks) else [])


def _ks(reproduction: Reproduction) -> list[int]:
    return sorted({reproduction.k, *reproduction.other_ks})


def _search(reproduction: Reproduction, model: LanguageModel) -> list[Trial]:
    cfg, ks = _short(reproduction), _ks(reproduction)
    first = {
        method: method.first_penalty(target_of(cfg, reproduction.k))
        for method in METHODS
        if method.first_penalty is not None
    }
    trials: dict[Method, list[Trial]] = {method: [] for method in first}

    def try_all(name: str, wanted: dict[Method, list[float]]) -> None:
        runs = {
            Run(f"{method.label} {i}", reproduction.k, reproduction.seeds[0]): (method, penalty)
            for method, penalties in wanted.items()
            for i, penalty in enumerate(penalties)
        }
        entries = {run: sweep_entry(method, run, cfg, p) for run, (method, p) in runs.items()}
        for group in groups_of(reproduction.output / name, cfg, entries, reproduction.memory):
            group.train(cfg, model)
            for label, l0 in _last_l0(group.log()).items():
                (run,) = (run for run in group.entries if run.name == label)
                method, penalty = runs[run]
                trials[method].append(Trial(method.label, penalty, l0))

    wanted = {
        method: [penalty * factor for factor in _FACTORS] for method, penalty in first.items()
    }
    for i in range(1, _ROUNDS + 1):
        try_all(f"penalties-{i}", wanted)
        wanted = {method: next_penalties(of, ks) for method, of in trials.items()}
        wanted = {method: penalties for method, penalties in wanted.items() if penalties}
        if not wanted:
            break
    last = {method: [penalty_at(of, float(k)) for k in ks] for method, of in trials.items()}
    try_all("penalties-last", last)
    return [trial for of_method in trials.values() for trial in of_method]


def _short(reproduction: Reproduction) -> RouteSAERunnerConfig:
    """The run's configuration for so many steps, with the schedule in proportion."""
    cfg = reproduction.cfg
    tokens = reproduction.search_steps * cfg.step_tokens
    schedule = {"lr_warm_up_steps": None, "lr_decay_steps": None}
    return replace(cfg, training_tokens=tokens, **schedule)  # type: ignore[arg-type]


def _last_l0(log: Iterable[dict[str, float | str]]) -> dict[str, float]:
    """Mean L0 over the last quarter of the records of each entry."""
    records: dict[str, list[float]] = defaultdict(list)
    for record in log:
        records[str(record["name"])].append(float(record["l0"]))
    return {name: statistics.fmean(l0[-max(1, len(l0) // 4) :]) for name, l0 in records.items()}
