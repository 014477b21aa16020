"""The methods of the comparison: one record each says how it is configured and where it is shown.

A method that is traded over sparsities aims at each of several k. TopK methods take k itself;
the others take the penalty that brings their L0 near k, which is searched for (`penalties.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

DEMO_K, DEMO_OTHER_KS, DEMO_TOKENS = 16, (8, 32), 250_000
"""Sizes that fit the demo model and 20 minutes on two cores."""

DEMO_READ_SHARE = 0.2
"""Threshold that the demo's features are read at: they are weaker than Llama's."""

Exhibit = Literal[
    "routers",
    "sparsity",
    "aggregation",
    "soft",
    "differences",
    "context-rules",
    "claims",
    "unscaled",
]
"""A table that shows some of the methods. "routers" and "sparsity" also choose those of figures."""

_TRADED: frozenset[Exhibit] = frozenset({"sparsity", "aggregation", "soft"})


class Target(NamedTuple):
    """The sizes that a method's settings depend on."""

    k: int
    """Active features per token to aim at."""
    d_in: int
    routed_blocks: tuple[int, ...]
    n_steps: int
    """Training steps."""
    penalty: float | None = None
    """What decides the L0 of a method without k; found by a search."""


@dataclass(frozen=True)
class Method:
    """One method of the comparison.

    Args:
        label: Its name in tables, figures and folders.
        settings: Fields of its training configuration, as `expand_runs` takes them.
        shown_in: Tables that show it; the tables of all methods show it in any case.
        first_penalty: Where the search for its penalty begins; None if it takes k. Any value will
            do: it only decides how many rounds the search takes.
        rate_of: Label of the method whose learning rate it takes; None finds its own by trial.
        has_twin: Whether it has a router that is compared with a share-matched random one.
        is_difference: Whether it is a RouteSAE that differs where the paper, its code and SAELens
            do, shown in the table of differences alone.
    """

    label: str
    settings: Callable[[Target], dict[str, Any]]
    shown_in: tuple[Exhibit, ...] = ()
    first_penalty: Callable[[Target], float] | None = None
    rate_of: str | None = None
    has_twin: bool = False
    is_difference: bool = False

    @property
    def is_traded(self) -> bool:
        """Whether it is also trained at the other sparsities."""
        return not _TRADED.isdisjoint(self.shown_in)

    @property
    def is_optional(self) -> bool:
        """Whether a reproduction may leave it out: no other method is compared with it."""
        return "routers" not in self.shown_in and self.label != "TopK"


def _topk(**fields: Any) -> Callable[[Target], dict[str, Any]]:
    """k active features; reads all routed blocks."""
    return lambda target: {"k": target.k, **fields}


def _single_topk(**fields: Any) -> Callable[[Target], dict[str, Any]]:
    """k active features; reads the last routed block, as the paper's single-layer baselines do."""
    return lambda target: {"k": target.k, "blocks": [target.routed_blocks[-1]], **fields}


def _penalized(architecture: str) -> Callable[[Target], dict[str, Any]]:
    """Reads the last routed block; an L1 coefficient brings its L0 near k."""
    return lambda target: {
        "blocks": [target.routed_blocks[-1]],
        "architecture": architecture,
        "l1_coefficient": target.penalty,
    }


def _jumprelu(target: Target) -> dict[str, Any]:
    # in so short a run the L0 penalty hardly moves the thresholds (.008 to .07 give 30 to 26
    # active features), so their initialization decides
    return {
        "blocks": [target.routed_blocks[-1]],
        "architecture": "route_jumprelu",
        "l0_coefficient": 0.015,
        "jumprelu_init_threshold": target.penalty,
    }


def _crosscoder(target: Target) -> dict[str, Any]:
    return {
        "architecture": "crosscoder",
        "l1_coefficient": target.penalty,
        "l1_warm_up_steps": target.n_steps // 4,
    }


def _best_of_saelens(target: Target) -> dict[str, Any]:
    """SAELens's TopK SAE with decoder rows of norm 1, which keeps its features alive."""
    return {**_single_topk(architecture="topk")(target), "decoder_init_norm": 1.0}


def _without_last_block(target: Target) -> dict[str, Any]:
    *others, _ = target.routed_blocks
    return {"k": target.k, **({"blocks": others} if others else {})}


def _difference(label: str, settings: Callable[[Target], dict[str, Any]]) -> Method:
    return Method(label, settings, ("differences",), rate_of="RouteSAE", is_difference=True)


METHODS = (
    ROUTE := Method("RouteSAE", _topk(), get_args(Exhibit), has_twin=True),
    Method(
        "RouteSAE, frozen router", _topk(router_objective="frozen"), ("routers",), has_twin=True
    ),
    ASSIGNMENT := Method(
        "RouteSAE, assignment",
        _topk(router_objective="assignment"),
        ("routers", "sparsity", "context-rules", "claims"),
        has_twin=True,
    ),
    RANDOM := Method("Random", _topk(routing="uniform"), ("routers", "sparsity", "claims")),
    PLAIN_MSE := Method("RouteSAE, plain MSE", _topk(loss="mse"), ("differences", "unscaled")),
    SOFT := Method("RouteSAE, soft", _topk(routing="soft"), ("soft",)),
    MEAN := Method("RouteSAE, mean", _topk(aggregation="mean"), ("differences",)),
    ATTENTION := Method(
        "RouteSAE, attention", _topk(aggregation="attention"), ("aggregation", "differences")
    ),
    MLSAE := Method("MLSAE", _topk(architecture="multi_layer_topk")),
    TOPK := Method("TopK", _single_topk(), ("sparsity", "context-rules")),
    Method("TopK, SAELens defaults", _single_topk(architecture="topk")),
    Method("TopK, SAELens, decoder norm 1", _best_of_saelens),
    RELU := Method("ReLU", _penalized("route_standard"), ("sparsity",), lambda _: 0.375, "TopK"),
    Method("Gated", _penalized("route_gated"), ("sparsity",), lambda _: 0.61, "TopK"),
    JUMPRELU := Method(
        "JumpReLU", _jumprelu, ("sparsity",), lambda target: 0.079 * target.d_in**0.5, "TopK"
    ),
    CROSSCODER := Method(
        "Crosscoder",
        _crosscoder,
        ("sparsity",),
        lambda target: 0.065 / (len(target.routed_blocks) * target.d_in) ** 0.5,
        "Crosscoder, TopK",
    ),
    CROSSCODER_TOPK := Method("Crosscoder, TopK", _topk(architecture="crosscoder_topk")),
    _difference("b_dec from 0 (the paper's code)", _topk(b_dec_init="zeros")),
    _difference("no latent bias (Eq. 10)", _topk(latent_bias=False)),
    _difference("SAELens's initialization, decoder norm 0.1", _topk(decoder_init_norm=0.1)),
    _difference("decoder norm never set", _topk(decoder_norm_interval=0)),
    _difference("SAELens's loss for dead features", _topk(aux_loss_coefficient=1.0)),
    _difference("without the last block", _without_last_block),
)
"""All methods, in the order of every table and figure; those that others refer to have a name."""


def shown_in(exhibit: Exhibit) -> list[Method]:
    """The methods that a table shows, in order."""
    return [method for method in METHODS if exhibit in method.shown_in]
