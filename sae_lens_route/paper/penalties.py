"""The penalty with which a method without k has a given L0, found by trial.

All methods are searched in one sweep a round. The first rounds go up or down from where a method's
search begins until the wanted L0 lie between those found; the last trains at what interpolation
says. An L0 is measured on the validation half of the held-out text: that of ReLU and gated SAEs
differs between pieces of text by a factor of twenty, so a few steps of training say little.

Trials are as long as the runs they are for, because in shorter ones the L0 has not come down yet.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from sae_lens_route.data.reading import Text
from sae_lens_route.models.kinds import LanguageModel
from sae_lens_route.paper.methods import Method
from sae_lens_route.paper.plan import (
    LearningRates,
    Penalties,
    Reproduction,
    Run,
    shortened,
    sweep_entry,
    target_of,
)
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
    """Active features per token on validation text."""


def find_penalties(
    reproduction: Reproduction,
    model: LanguageModel,
    validation: Text,
    learning_rates: LearningRates,
) -> Penalties:
    """The penalties of all methods without k, for every k of the reproduction.

    `penalties.json` in its folder holds all that was tried; an earlier run's is read.

    Args:
        reproduction: Text to train on, tokens to evaluate on, and every k.
        model: The language model.
        validation: Text to measure L0 on.
        learning_rates: Of the methods.
    """
    path = reproduction.output / "penalties.json"
    trials = cached(
        path, list[Trial], lambda: _search(reproduction, model, validation, learning_rates)
    )
    return {
        (method.label, k): penalty_at([t for t in trials if t.method == method.label], float(k))
        for method in reproduction.methods
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


def _search(
    reproduction: Reproduction,
    model: LanguageModel,
    validation: Text,
    learning_rates: LearningRates,
) -> list[Trial]:
    cfg = shortened(reproduction.cfg, reproduction.search_steps)
    ks, n_tokens = _ks(reproduction), reproduction.eval_tokens
    first = {
        method: method.first_penalty(target_of(cfg, reproduction.k))
        for method in reproduction.methods
        if method.first_penalty is not None
    }
    trials: dict[Method, list[Trial]] = {method: [] for method in first}

    def try_all(name: str, wanted: dict[Method, list[float]]) -> None:
        runs = {
            Run(f"{method.label} {i}", reproduction.k, reproduction.seeds[0]): (method, penalty)
            for method, penalties in wanted.items()
            for i, penalty in enumerate(penalties)
        }
        entries = {
            run: sweep_entry(method, run, cfg, penalty, learning_rates[method.label])
            for run, (method, penalty) in runs.items()
        }
        for group in groups_of(reproduction.output / name, cfg, entries, reproduction.memory):
            for run, metrics in group.reconstructed(cfg, model, validation, n_tokens).items():
                method, penalty = runs[run]
                trials[method].append(Trial(method.label, penalty, metrics.l0))

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
