"""The learning rate of each method, found by trial with the same small budget for all.

A method is trained for a third of the steps at four rates, and keeps the one with the lowest
NormMSE on the validation half of the held-out text. Variants of the RouteSAE take its rate, so that
they differ from it in one thing. A method whose L0 depends on a penalty takes that of the method
with k that reads the same blocks: at another rate the same penalty would have another L0.
"""

from __future__ import annotations

from collections.abc import Sequence

from sae_lens_route.data.reading import Text
from sae_lens_route.models.kinds import LanguageModel
from sae_lens_route.paper.methods import METHODS
from sae_lens_route.paper.plan import LearningRates, Reproduction, Run, shortened, sweep_entry
from sae_lens_route.paper.results import RateTrial
from sae_lens_route.paper.stages import cached, groups_of

_FACTORS = (1.0, 2.5, 6.25, 15.625)
"""Of the run's rate."""
_SHARE = 3
"""The steps of a run are this many times those of a trial."""


def try_learning_rates(
    reproduction: Reproduction, model: LanguageModel, validation: Text
) -> list[RateTrial]:
    """All trials; `learning_rates.json` holds them for the next run.

    Args:
        reproduction: Text to train on, and tokens to evaluate on.
        model: The language model.
        validation: Text to compare on.
    """
    path = reproduction.output / "learning_rates.json"
    return cached(path, list[RateTrial], lambda: _trials(reproduction, model, validation))


def best_learning_rates(trials: Sequence[RateTrial]) -> LearningRates:
    """The rate of every method: that of its trial with the lowest error, or another method's."""
    best = {trial.method: trial.lr for trial in sorted(trials, key=lambda t: -t.norm_mse)}
    sources = {method.label: method.rate_of or method.label for method in METHODS}
    return {label: best[source] for label, source in sources.items() if source in best}


def _trials(reproduction: Reproduction, model: LanguageModel, validation: Text) -> list[RateTrial]:
    cfg = shortened(reproduction.cfg, reproduction.cfg.total_training_steps // _SHARE)
    methods = [method for method in reproduction.methods if method.rate_of is None]
    seed = reproduction.seeds[0]
    tried = {
        Run(f"{method.label} x{factor:g}", reproduction.k, seed): (method, factor * cfg.lr)
        for method in methods
        for factor in _FACTORS
    }
    entries = {run: sweep_entry(method, run, cfg, lr=lr) for run, (method, lr) in tried.items()}
    folder, n_tokens = reproduction.output / "learning-rates", reproduction.eval_tokens
    return [
        RateTrial(tried[run][0].label, tried[run][1], metrics.norm_mse)
        for group in groups_of(folder, cfg, entries, reproduction.memory)
        for run, metrics in group.reconstructed(cfg, model, validation, n_tokens).items()
    ]
