"""Which dictionaries a reproduction trains: its settings, and one `Run` for each dictionary.

Every method has a run per seed at one sparsity ("main"), those of the figures over sparsity one run
at each further k ("sparsity"), and the variants of the RouteSAE one per seed ("differences"). Every
router also has a random twin with its shares of the tokens ("share_matched").
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from sae_lens_route.config import RouteSAERunnerConfig
from sae_lens_route.data.reading import Text
from sae_lens_route.paper.methods import METHODS, Method, Target
from sae_lens_route.training.entries import SweepEntry, expand_runs

Stage = Literal["main", "sparsity", "differences", "share_matched"]


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
    training_tokens: int
    step_tokens: int
    lr: float
    eval_tokens: int
    feature_tokens: int
    torch: str


@dataclass(frozen=True)
class Reproduction:
    """The experiments to run.

    Args:
        cfg: Model, text, tokens, schedule; `cfg.sae` gives d_in and d_sae.
        k: Sparsity of the main comparison.
        other_ks: Further sparsities, for the methods of the trade-off figures, with one seed.
        seeds: Seeds of the main comparison.
        eval_dataset: Held-out text.
        eval_tokens: Tokens of it to evaluate on.
        feature_tokens: Tokens of it to read features on.
        output: Folder for everything.
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
    judge: str | None = None
    base_url: str | None = None

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
            training_tokens=cfg.total_training_steps * cfg.step_tokens,
            step_tokens=cfg.step_tokens,
            lr=cfg.lr,
            eval_tokens=self.eval_tokens,
            feature_tokens=self.feature_tokens,
            torch=torch.__version__,
        )

    def runs(self) -> list[Run]:
        """All runs except the twins, whose shares are not known before the routers are trained."""
        runs = [
            Run(method.label, self.k, seed, "differences" if method.is_difference else "main")
            for method in METHODS
            for seed in self.seeds
        ]
        return runs + [
            Run(method.label, k, self.seeds[0], "sparsity")
            for k in self.other_ks
            for method in METHODS
            if method.is_traded
        ]


def sweep_entries(runs: Iterable[Run], cfg: RouteSAERunnerConfig) -> dict[Run, SweepEntry]:
    """The sweep entry of each run.

    Args:
        runs: Runs of the methods in `METHODS`.
        cfg: Configuration of the sweep, resolved against the model.
    """
    methods: dict[str, Method] = {method.label: method for method in METHODS}
    entries = {}
    for run in runs:
        blocks = tuple(cfg.routed_blocks or ())
        target = Target(run.k, cfg.sae.d_in, blocks, cfg.total_training_steps)
        settings = {"d_sae": cfg.sae.d_sae, **methods[run.method].settings(target)}
        (entries[run],) = expand_runs({run.method: settings}, cfg.sae.d_in, [run.seed]).values()
    return entries
