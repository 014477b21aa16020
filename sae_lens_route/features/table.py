"""The table of a RouteSAE's contexts and feature profiles, in memory and as parquet.

`contexts.parquet` has one row per context, with the fields of `Context`; `features.parquet` one per
feature, with the fields of `FeatureProfile`. Both carry the `ContextRun` in their metadata.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int
from sae_lens.saes.sae import SAE

from sae_lens_route.errors import UserError, reading_errors
from sae_lens_route.records import typed
from sae_lens_route.saes.metadata import routed_blocks
from sae_lens_route.saes.units import Units, is_scaled, require_units

THRESHOLD_SHARE = 0.331
"""The paper's threshold 15 at d_in = 2048, as a share of sqrt(d_in), a normalized stream's norm."""

REFERENCE_MAX_CLASSES = 32


@dataclass(frozen=True)
class ContextOptions:
    """How contexts are chosen; the defaults are the paper's.

    Args:
        threshold: Activations strictly above it are contexts. None means 0.331 * sqrt(d_in), the
            paper's 15 at d_in = 2048.
        thresholds: Further thresholds at which to count interpretable features, in the same pass.
        max_per_class: Contexts kept per feature and token class, the strongest. The class of a
            token is the tokenizer's raw token, stripped and lower-cased: "Ġfoo" is not "foo".
        max_length: Tokens of a context; a longer sentence is cut around the activated token.
        min_contexts: Features with fewer contexts are dropped.
        max_classes: Features with more token classes are dropped; None keeps them.
        max_contexts_per_feature: Contexts kept per feature, the strongest; bounds the memory.
        sentences: "decoded" looks for sentence ends in the decoded text (`."` ends one, the point
            in 3.14 does not) and never crosses a special token. "raw_tokens" follows the
            reference: a raw token . ! ? or " ends a sentence, `max_length // 2` tokens are kept
            on each side, and equal activations are ordered by their text.
        units: Of thresholds and activations (`saes/units.py`): "n(x)", or "x_route", the paper's.

    Raises:
        UserError: a value is out of range, or `max_contexts_per_feature` is too small for
            `min_contexts` and `max_classes`.
    """

    threshold: float | None = None
    thresholds: tuple[float, ...] = ()
    max_per_class: int = 2
    max_length: int = 64
    min_contexts: int = 4
    max_classes: int | None = None
    max_contexts_per_feature: int = 128
    sentences: Literal["decoded", "raw_tokens"] = "decoded"
    units: Units = "n(x)"

    def __post_init__(self) -> None:
        require_units(self.units)
        for threshold in (self.threshold or 0.0, *self.thresholds):
            if threshold < 0:
                raise UserError(
                    f"threshold={threshold}: must be at least 0, because inactive features have no "
                    "contexts"
                )
        for name in ("max_per_class", "max_length", "min_contexts"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        needed = max(self.min_contexts, self.max_per_class * (self.max_classes or 0) + 1)
        if self.max_contexts_per_feature < needed:
            raise UserError(
                f"max_contexts_per_feature={self.max_contexts_per_feature}: must be at least "
                f"{needed} to apply min_contexts and max_classes"
            )

    @classmethod
    def reference(
        cls, threshold: float = 15.0, max_length: int = 64, max_per_token: int = 2, lines: int = 4
    ) -> ContextOptions:
        """The rules of the paper's code, with its argument names.

        `lines` is a strict bound there. That code also excludes no token.
        """
        return cls(
            threshold=threshold,
            max_per_class=max_per_token,
            max_length=max_length,
            min_contexts=lines + 1,
            max_classes=REFERENCE_MAX_CLASSES,
            max_contexts_per_feature=max(128, max_per_token * REFERENCE_MAX_CLASSES + 1, lines + 1),
            sentences="raw_tokens",
            units="x_route",
        )

    @property
    def all_thresholds(self) -> tuple[float, ...]:
        """`threshold`, if it is a number, and `thresholds`, ascending."""
        own = () if self.threshold is None else (self.threshold,)
        return tuple(sorted({*own, *self.thresholds}))


def default_threshold(d_in: int) -> float:
    """0.331 * sqrt(d_in): the paper's 15 at d_in = 2048, scaled with the norm of the input."""
    return THRESHOLD_SHARE * d_in**0.5


class Context(NamedTuple):
    """One token on which a feature is active, with its sentence."""

    feature: int
    token_class: str
    """The activated token as the tokenizer stores it, stripped and lower-cased."""
    token: str
    """The activated token as it reads in the text."""
    activation: float
    block: int
    """The block that the token is routed to."""
    hook: str
    """The source hook of that block, such as `blocks.3.hook_resid_post`."""
    weight: float
    """Route weight of the token: p of its block, or 1 under uniform routing."""
    text: str
    """The sentence, with the token between <ACTIVATED> and </ACTIVATED>."""
    sequence: int
    """Index in the stream."""
    position: int
    """Index of the token in its sequence."""


class FeatureProfile(NamedTuple):
    """How often and at which blocks a feature fires, over all its activations above 0."""

    feature: int
    interpretable: bool
    """Whether the feature passes the filters at the table's threshold and has contexts there."""
    n_contexts: int
    """Contexts above the threshold, at most `max_per_class` per class and N in all."""
    n_classes: int
    """Token classes of those contexts."""
    n_fired: int
    """Kept tokens on which the feature is active."""
    density: float
    """Share of the kept tokens on which the feature is active."""
    max_activation: float
    n_fired_by_block: dict[int, int]
    """Kept tokens on which the feature is active, by the block they are routed to."""
    share_by_block: dict[int, float] | None
    """`n_fired_by_block` as shares that sum to 1. Like the fields below, None for a feature that
    never fired."""
    mean_block: float | None
    """Mean of the blocks, weighted by the shares."""
    block_entropy: float | None
    """Entropy of the shares, in nats: 0 at a single block, log L when spread evenly."""
    depth: Literal["shallow", "deep"] | None
    """Shallow if the mean route lies before the middle of the routes, (L - 1) / 2."""
    mean_activation: float | None = None
    """Mean over the kept tokens on which the feature is active; also None in earlier results."""


class ThresholdCount(NamedTuple):
    """How many features are interpretable at one threshold (the paper's Figure 5)."""

    threshold: float
    n_features: int
    """Features that pass `min_contexts` and `max_classes`."""
    n_contexts: int
    """Their contexts."""


@dataclass(frozen=True)
class ContextRun:
    """What a table was made from."""

    options: ContextOptions
    """With the threshold as a number."""
    hook_names: tuple[str, ...]
    """Source hooks of the routed blocks, in order."""
    routed_blocks: tuple[int, ...]
    """Block of each route."""
    d_sae: int
    n_tokens: int
    """Tokens read, without the excluded ones."""
    n_sequences: int
    counts: tuple[ThresholdCount, ...]
    """Ascending by threshold; the table's own threshold is among them."""


CONTEXT_SCHEMA = pa.schema(
    [
        ("feature", pa.int32()),
        ("token_class", pa.string()),
        ("token", pa.string()),
        ("activation", pa.float32()),
        ("block", pa.int16()),
        ("hook", pa.string()),
        ("weight", pa.float32()),
        ("text", pa.string()),
        ("sequence", pa.int64()),
        ("position", pa.int32()),
    ]
)

FEATURE_SCHEMA = pa.schema(
    [
        ("feature", pa.int32()),
        ("interpretable", pa.bool_()),
        ("n_contexts", pa.int32()),
        ("n_classes", pa.int32()),
        ("n_fired", pa.int64()),
        ("density", pa.float64()),
        ("max_activation", pa.float32()),
        ("n_fired_by_block", pa.map_(pa.int16(), pa.int64())),
        ("share_by_block", pa.map_(pa.int16(), pa.float64())),
        ("mean_block", pa.float64()),
        ("block_entropy", pa.float64()),
        ("depth", pa.string()),
        ("mean_activation", pa.float32()),
    ]
)

_RUN_KEY = b"sae_lens_route"


@dataclass(frozen=True)
class FeatureTable:
    """Contexts of the interpretable features, and a profile of every feature."""

    contexts: pa.Table
    """A `Context` per row, ordered by feature, token class and falling activation."""
    features: pa.Table
    """A `FeatureProfile` per row, one for each feature of the SAE."""
    run: ContextRun

    @cached_property
    def interpretable(self) -> list[int]:
        """The features that have contexts in this table, ascending."""
        return np.flatnonzero(self.features["interpretable"].to_numpy()).tolist()

    def contexts_of(self, feature: int) -> list[Context]:
        """Contexts of one feature, the strongest first; none if it is not interpretable."""
        first, last = np.searchsorted(self._context_features, [feature, feature + 1])
        rows = [Context(**row) for row in self.contexts.slice(first, last - first).to_pylist()]
        return sorted(rows, key=lambda context: -context.activation)

    def profile(self, feature: int) -> FeatureProfile:
        """How often and at which blocks one feature fires.

        Raises:
            IndexError: the SAE has no such feature.
        """
        if not 0 <= feature < self.run.d_sae:
            raise IndexError(f"feature {feature}: the SAE has {self.run.d_sae}")
        (row,) = self.features.slice(feature, 1).to_pylist()
        for name in ("n_fired_by_block", "share_by_block"):  # maps are read as lists of pairs
            row[name] = None if row[name] is None else dict(row[name])
        return FeatureProfile(**row)

    @cached_property
    def _context_features(self) -> Int[np.ndarray, " contexts"]:
        return self.contexts["feature"].to_numpy()

    def to_parquet(self, folder: str | Path) -> None:
        """Write `contexts.parquet` and `features.parquet` to a folder, created if missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {_RUN_KEY: json.dumps(asdict(self.run)).encode()}
        for name, table in (("contexts", self.contexts), ("features", self.features)):
            pq.write_table(table.replace_schema_metadata(metadata), folder / f"{name}.parquet")

    @classmethod
    def from_parquet(cls, folder: str | Path) -> FeatureTable:
        """Read the files that `to_parquet` wrote.

        Raises:
            UserError: a file cannot be read, or an earlier version wrote them, in units that they
                do not name.
        """
        with reading_errors(str(folder)):
            contexts, features = (
                pq.read_table(Path(folder) / f"{name}.parquet") for name in ("contexts", "features")
            )
        if "mean_activation" not in features.column_names:
            raise UserError(
                f"{folder}: features of an earlier version, which did not record their units: find "
                "them again with `features`"
            )
        return cls(
            contexts=contexts.replace_schema_metadata(None),
            features=features.replace_schema_metadata(None),
            run=typed(ContextRun, json.loads(contexts.schema.metadata[_RUN_KEY])),
        )

    def to_reference_json(self, path: str | Path) -> None:
        """Write the layout of the paper's code: feature -> token class -> contexts."""
        contexts: dict[str, dict[str, list[dict[str, str | float]]]] = {}
        columns = ["feature", "token_class", "text", "activation"]
        for row in self.contexts.select(columns).to_pylist():
            classes = contexts.setdefault(str(row["feature"]), {})
            classes.setdefault(row["token_class"], []).append(
                {"context": row["text"], "activation": row["activation"]}
            )
        options = self.run.options
        layout = {
            "total_latents": len(contexts),
            "threshold": options.threshold,
            "max_length": options.max_length,
            "max_per_token": options.max_per_class,
            "lines": options.min_contexts - 1,
            "latent_context_map": contexts,
        }
        text = json.dumps(layout, ensure_ascii=False, indent=4)
        Path(path).write_text(text, encoding="utf-8")


def require_table_of(sae: SAE[Any], table: FeatureTable, units: Units) -> None:
    """Check that a table is of this SAE and in these units.

    Raises:
        UserError: it is not.
    """
    run = table.run
    if (run.d_sae, list(run.routed_blocks)) != (sae.cfg.d_sae, routed_blocks(sae)):
        raise UserError(
            f"feature_table is of an SAE with d_sae={run.d_sae} and "
            f"routed_blocks={list(run.routed_blocks)}, but this SAE has d_sae={sae.cfg.d_sae} and "
            f"routed_blocks={routed_blocks(sae)}: find the contexts of this SAE"
        )
    if run.options.units != units and is_scaled(sae):
        raise UserError(
            f"feature_table is in units of {run.options.units}, but units={units!r}: pass "
            f"units={run.options.units!r}, or find the contexts in units of {units}"
        )
