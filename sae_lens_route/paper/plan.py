"""Which dictionaries a reproduction trains: its settings, and one `Run` for each dictionary.

Every method has a run per seed at one sparsity ("main"), those of the figures over sparsity one run
at each further k ("sparsity"), and the variants of the RouteSAE one per seed ("differences"). Every
router also has a random twin with its shares of the tokens ("share_matched").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from sae_lens_route.config import RouteSAERunnerConfig
from sae_lens_route.data.reading import Text
from sae_lens_route.errors import UserError
from sae_lens_route.paper.methods import METHODS, Method, Target
from sae_lens_route.training.entries import SweepEntry, expand_runs

Stage = Literal["main", "sparsity", "differences", "share_matched"]

PAPER_SHARE = 0.331
"""The paper's threshold of 15 on activations, as a share of sqrt(d_in) of its model."""

Penalties = Mapping[tuple[str, int], float]
"""By a method's label and the k it aims at."""

LearningRates = Mapping[str, float]
"""By a method's label."""


@dataclass(frozen=True)
class Run:
    """One dictionary of a reproduction.

    Args:
        method: Label of its `Method`.
        k: Active features per token that it aims at.
        seed: Seed of its weights.
        stage: The comparison it belongs to.
    """

    method: str
    k: int
    seed: int
    stage: Stage = "main"

    @property
    def name(self) -> str:
        """Name of its entry and its folder; a twin has that of its router, in another sweep."""
        last = f"k={self.k}" if self.stage == "sparsity" else f"seed={self.seed}"
        return f"{self.method} {last}"


@dataclass(frozen=True)
class Settings:
    """The settings that a reproduction's numbers depend on."""

    model_name: str
    dataset_path: str
    routed_blocks: list[int]
    d_in: int
    d_sae: int
    k: int
    other_ks: list[int]
    seeds: list[int]
    without: list[str]
    training_tokens: int
    step_tokens: int
    lr: float
    dead_feature_window: int
    eval_tokens: int
    feature_tokens: int
    read_share: float
    search_tokens: int
    torch: str


@dataclass(frozen=True)
class Reproduction:
    """The experiments to run.

    Args:
        cfg: Model, text, tokens, schedule; `cfg.sae` gives d_in and d_sae.
        k: Sparsity of the main comparison.
        other_ks: Further sparsities, for the methods of the trade-off figures, with one seed.
        seeds: Seeds of the main comparison.
        eval_dataset: Held-out text; the tables read the half of it that no choice was made on.
        eval_tokens: Tokens of it to evaluate on.
        feature_tokens: Tokens of it to read features on.
        output: Folder for everything.
        without: Labels of methods to leave out, such as those that cost most.
        search_tokens: Training tokens of each dictionary in the search for penalties; None takes
            those of the run.
        read_share: Threshold above which activations are contexts, as a share of sqrt(d_in). The
            paper's 15 is 0.331.
        memory: Bytes that the dictionaries of a group may take in training; None takes three
            quarters of what is free on the device.
        judge: Model that scores features through an OpenAI-compatible endpoint; None leaves only
            the surface score.
        base_url: That endpoint.
    """

    cfg: RouteSAERunnerConfig
    k: int
    other_ks: tuple[int, ...]
    seeds: tuple[int, ...]
    eval_dataset: Text
    eval_tokens: int
    feature_tokens: int
    output: Path
    without: tuple[str, ...] = ()
    search_tokens: int | None = None
    read_share: float = PAPER_SHARE
    memory: int | None = None
    judge: str | None = None
    base_url: str | None = None

    def __post_init__(self) -> None:
        optional = [method.label for method in METHODS if method.is_optional]
        for label in self.without:
            if label not in optional:
                raise UserError(f"without={label!r}: must be one of {', '.join(optional)}")
        for method in self.methods:
            if method.rate_of in self.without:
                raise UserError(
                    f"without={method.rate_of!r}: {method.label!r} takes its learning rate; leave "
                    "that out, too"
                )

    @property
    def methods(self) -> list[Method]:
        """The methods that are trained."""
        return [method for method in METHODS if method.label not in self.without]

    def settings(self) -> Settings:
        """The settings, once `cfg` is resolved against the model."""
        cfg = self.cfg
        return Settings(
            model_name=cfg.model_name,
            dataset_path=cfg.dataset_path,
            routed_blocks=list(cfg.routed_blocks or ()),
            d_in=cfg.sae.d_in,
            d_sae=cfg.sae.d_sae,
            k=self.k,
            other_ks=list(self.other_ks),
            seeds=list(self.seeds),
            without=list(self.without),
            training_tokens=cfg.total_training_steps * cfg.step_tokens,
            step_tokens=cfg.step_tokens,
            lr=cfg.lr,
            dead_feature_window=cfg.dead_feature_window,
            eval_tokens=self.eval_tokens,
            feature_tokens=self.feature_tokens,
            read_share=self.read_share,
            search_tokens=self.search_steps * cfg.step_tokens,
            torch=torch.__version__,
        )

    @property
    def search_steps(self) -> int:
        """Training steps of each dictionary in the search for penalties."""
        steps = self.cfg.total_training_steps
        tokens = self.search_tokens or steps * self.cfg.step_tokens
        return max(1, tokens // self.cfg.step_tokens)

    def runs(self) -> list[Run]:
        """All runs except the twins, whose shares are not known before the routers are trained."""
        runs = [
            Run(method.label, self.k, seed, "differences" if method.is_difference else "main")
            for method in self.methods
            for seed in self.seeds
        ]
        return runs + [
            Run(method.label, k, self.seeds[0], "sparsity")
            for k in self.other_ks
            for method in self.methods
            if method.is_traded
        ]


def shortened(cfg: RouteSAERunnerConfig, n_steps: int) -> RouteSAERunnerConfig:
    """The configuration with fewer steps, and the schedule in proportion."""
    tokens = max(1, n_steps) * cfg.step_tokens
    return replace(cfg, training_tokens=tokens, lr_warm_up_steps=None, lr_decay_steps=None)


def sweep_entries(
    runs: Iterable[Run],
    cfg: RouteSAERunnerConfig,
    penalties: Penalties,
    learning_rates: LearningRates,
) -> dict[Run, SweepEntry]:
    """The sweep entry of each run.

    Args:
        runs: Runs of the methods in `METHODS`.
        cfg: Configuration of the sweep, resolved against the model.
        penalties: Of the methods that do not take k.
        learning_rates: Of the methods that do not train at the run's.
    """
    methods = {method.label: method for method in METHODS}
    return {
        run: sweep_entry(
            methods[run.method],
            run,
            cfg,
            penalties.get((run.method, run.k)),
            learning_rates.get(run.method),
        )
        for run in runs
    }


def sweep_entry(
    method: Method,
    run: Run,
    cfg: RouteSAERunnerConfig,
    penalty: float | None = None,
    lr: float | None = None,
) -> SweepEntry:
    """The entry of one run, with a penalty if its method takes one."""
    target = target_of(cfg, run.k)._replace(penalty=penalty)
    settings = {"d_sae": cfg.sae.d_sae, "lr": lr, **method.settings(target)}
    (entry,) = expand_runs({run.method: settings}, cfg.sae.d_in, [run.seed]).values()
    return entry


def target_of(cfg: RouteSAERunnerConfig, k: int) -> Target:
    """What a method of the run aims at."""
    return Target(k, cfg.sae.d_in, tuple(cfg.routed_blocks or ()), cfg.total_training_steps)
