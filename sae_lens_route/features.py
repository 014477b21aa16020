"""Contexts of features: what a feature fires on, and at which layers (paper 3.3).

1. Stream tokens with their residual streams at the routed layers; route and encode them.
2. Sieve: activations above the threshold, special tokens and padding left out, become candidates,
   each with its sentence: from after the previous sentence end to the next one, at most 64 tokens.
3. Merge: for each feature and activated token class, the 2 strongest candidates stay.
4. Read out: features with fewer than 4 contexts are dropped, the rest are turned into text.

Steps 2 and 3 are array operations; only contexts that are read out meet Python one at a time.
The result depends neither on the batch size nor on how the stream is cut: candidates have a total
order, activation first, then (for equal activations) the earlier in the stream.

**Memory.** A feature keeps at most `max_contexts_per_feature` (N) of its contexts, the strongest.
The table therefore holds at most `d_sae * N` rows of `4 * max_length + 42` bytes (the tokens of the
sentence, and what else a context has), 1.5 times that for a moment while it grows: 0.6 GB for
d_sae 16384 when every feature is full. Candidates wait for a merge in rows of 42 bytes: at most
2^17 or half the table's rows, whichever is larger, and one batch's, with at most 2^22 tokens and
one batch's. Beside these there are d_sae * L counts. Nothing grows with the stream.

**Several thresholds** (the paper's Figure 5) cost one pass: the 2 strongest above a higher
threshold are among the 2 strongest above a lower one, so the table of the lowest answers for all.
N does not disturb this: a feature cut at N rows still has the N strongest contexts of every
threshold, and N is at least what `min_contexts` and `max_classes` need in order to decide.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float, Float32, Int
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from torch import Tensor

from sae_lens_route.saes import RoutedSAE
from sae_lens_route.sentences import DecodedSentences, ReferenceSentences, Vocabulary

THRESHOLD_SHARE = 0.331
"""The paper's threshold 15 as a share of sqrt(d_in), the norm of a normalised activation."""

REFERENCE_MAX_CLASSES = 32
_MIN_PENDING = 2**17
_MAX_PENDING_TOKENS = 2**22
# feature activations encoded at once, so that a large batch and a wide SAE fit in memory
_ENCODE_ELEMENTS = 2**26

# a candidate, and what of it stays beside its window once it is in the table
_PLACE = [
    ("weight", np.float32),
    ("sequence", np.int64),
    ("position", np.int32),
    ("length", np.int16),  # of the window
    ("before", np.int16),  # tokens of the window before the activated one
    ("layer", np.int16),
]
_CANDIDATE = np.dtype(
    [
        ("pair", np.int64),  # feature * n_classes + class
        ("activation", np.float32),
        ("start", np.int64),  # of the window, in the pending tokens
        *_PLACE,
    ]
)


class ActivationBatch(NamedTuple):
    """What `find_contexts` takes, batch by batch: sequences in the order of the text."""

    tokens: Int[Tensor, "batch pos"]
    """Token ids, one sequence per row; a context never leaves its row."""
    activations: Float[Tensor, "batch pos L d"]
    """Residual streams after the routed layers, aligned with the tokens."""
    mask: Bool[Tensor, "batch pos"] | None = None
    """False where a token is passed over (padding that is no special token); None: nowhere."""


@dataclass(frozen=True)
class ContextOptions:
    """How contexts are chosen; the defaults are the paper's.

    Args:
        threshold: activations strictly above it are contexts; None is 0.331 * sqrt(d_in), which is
            the paper's 15 at d_in = 2048.
        thresholds: further thresholds to count interpretable features at, in the same pass.
        max_per_class: contexts kept per feature and class of activated token, the strongest.
            A class is the tokenizer's raw token, stripped and lower-cased: "Ġfoo" is not "foo".
        max_length: tokens of a context; a longer sentence is cut to as many around the token.
        min_contexts: features with fewer contexts are dropped.
        max_classes: features with more token classes are dropped; None keeps them.
        max_contexts_per_feature: the strongest contexts kept per feature: the bound on memory.
        sentences: "decoded" finds sentence ends in the decoded text (`."` ends one, the point in
            3.14 does not) and never crosses a special token; "raw_tokens" is the reference's rule
            (a sentence ends at a raw token . ! ? or ", `max_length // 2` tokens are kept on each
            side, equal activations are ordered by their text).
        mask_special_tokens: pass over the tokenizer's special tokens, such as BOS, EOS, padding.
    """

    threshold: float | None = None
    thresholds: tuple[float, ...] = ()
    max_per_class: int = 2
    max_length: int = 64
    min_contexts: int = 4
    max_classes: int | None = None
    max_contexts_per_feature: int = 128
    sentences: Literal["decoded", "raw_tokens"] = "decoded"
    mask_special_tokens: bool = True

    def __post_init__(self) -> None:
        if any(t < 0 for t in (self.threshold or 0.0, *self.thresholds)):
            raise ValueError("thresholds must be >= 0: an inactive feature has no contexts")
        for name in ("max_per_class", "max_length", "min_contexts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        needed = max(self.min_contexts, self.max_per_class * (self.max_classes or 0) + 1)
        if self.max_contexts_per_feature < needed:
            raise ValueError(
                f"max_contexts_per_feature={self.max_contexts_per_feature}: min_contexts and "
                f"max_classes can only be decided with at least {needed}"
            )

    @classmethod
    def reference(
        cls,
        threshold: float = 15.0,
        max_length: int = 64,
        max_per_token: int = 2,
        lines: int = 4,
    ) -> ContextOptions:
        """What the paper's code does, under its own argument names (`lines` is strict there)."""
        return cls(
            threshold=threshold,
            max_per_class=max_per_token,
            max_length=max_length,
            min_contexts=lines + 1,
            max_classes=REFERENCE_MAX_CLASSES,
            max_contexts_per_feature=max(128, max_per_token * REFERENCE_MAX_CLASSES + 1, lines + 1),
            sentences="raw_tokens",
            mask_special_tokens=False,
        )


def default_threshold(d_in: int) -> float:
    """0.331 * sqrt(d_in): the share of a normalised activation's norm that 15 is at d_in 2048."""
    return THRESHOLD_SHARE * d_in**0.5


class Context(NamedTuple):
    """One place where a feature fires."""

    feature: int
    token_class: str
    """The activated token as the tokenizer stores it, stripped and lower-cased."""
    token: str
    """The activated token as it reads in the text."""
    activation: float
    layer: int
    """Routed layer of the token: an index into the routed layers."""
    hook: str
    """The source hook of that layer, such as `blocks.3.hook_resid_post`."""
    weight: float
    """Route weight of the token: p of its layer, or 1 under uniform routing."""
    text: str
    """The sentence, with the token between <ACTIVATED> and </ACTIVATED>."""
    sequence: int
    """Index of the sequence in the stream."""
    position: int
    """Position of the token in its sequence."""


class FeatureProfile(NamedTuple):
    """Where and how often a feature fires, over all its activations above 0."""

    feature: int
    interpretable: bool
    """Whether it passed the filters at the table's threshold and has contexts there."""
    n_contexts: int
    """Contexts above the threshold, at most 2 per class and at most N."""
    n_classes: int
    """Token classes of those contexts."""
    n_fired: int
    """Tokens on which it is active."""
    density: float
    """Share of the tokens on which it is active."""
    max_activation: float
    layer_counts: list[int]
    """Tokens on which it is active, per routed layer."""
    layer_share: list[float] | None
    """The same as shares that sum to 1; None for a feature that never fired, as all below."""
    mean_layer: float | None
    """Mean index of the routed layer."""
    layer_entropy: float | None
    """Entropy of the shares, in nats: 0 at one layer, log L when spread evenly."""
    depth: Literal["shallow", "deep"] | None
    """Shallow when the mean layer lies before the middle of the routed layers, (L - 1) / 2."""


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
    """Source hooks of the routed layers, in order."""
    d_sae: int
    n_tokens: int
    """Tokens counted, those passed over left out."""
    n_sequences: int
    counts: tuple[ThresholdCount, ...]
    """Ascending by threshold; the table's own threshold is among them."""


_CONTEXT_SCHEMA = pa.schema(
    [
        ("feature", pa.int32()),
        ("token_class", pa.string()),
        ("token", pa.string()),
        ("activation", pa.float32()),
        ("layer", pa.int16()),
        ("hook", pa.string()),
        ("weight", pa.float32()),
        ("text", pa.string()),
        ("sequence", pa.int64()),
        ("position", pa.int32()),
    ]
)
_FEATURE_SCHEMA = pa.schema(
    [
        ("feature", pa.int32()),
        ("interpretable", pa.bool_()),
        ("n_contexts", pa.int32()),
        ("n_classes", pa.int32()),
        ("n_fired", pa.int64()),
        ("density", pa.float64()),
        ("max_activation", pa.float32()),
        ("layer_counts", pa.list_(pa.int64())),
        ("layer_share", pa.list_(pa.float64())),
        ("mean_layer", pa.float64()),
        ("layer_entropy", pa.float64()),
        ("depth", pa.string()),
    ]
)
_RUN_KEY = b"sae_lens_route"


@dataclass(frozen=True)
class FeatureTable:
    """Contexts of the interpretable features, and a profile of every feature.

    Args:
        contexts: one row per context, the fields of `Context`; ordered by feature, class and
            falling activation.
        features: one row per feature of the SAE, the fields of `FeatureProfile`.
        run: what it was made from, and the counts per threshold.
    """

    contexts: pa.Table
    features: pa.Table
    run: ContextRun

    @cached_property
    def interpretable(self) -> list[int]:
        """The features that have contexts here, ascending."""
        return np.flatnonzero(self.features["interpretable"].to_numpy()).tolist()

    def contexts_of(self, feature: int) -> list[Context]:
        """Contexts of one feature, the strongest first; none if it is not interpretable."""
        first, last = np.searchsorted(self._context_features, [feature, feature + 1])
        rows = [Context(**row) for row in self.contexts.slice(first, last - first).to_pylist()]
        return sorted(rows, key=lambda context: -context.activation)

    def profile(self, feature: int) -> FeatureProfile:
        """Where and how often one feature fires."""
        if not 0 <= feature < self.run.d_sae:
            raise IndexError(f"feature {feature}: the SAE has {self.run.d_sae}")
        return FeatureProfile(**self.features.slice(feature, 1).to_pylist()[0])

    @cached_property
    def _context_features(self) -> np.ndarray:
        return self.contexts["feature"].to_numpy()

    def to_parquet(self, folder: str | Path) -> None:
        """Write `contexts.parquet` and `features.parquet` into a folder, made if missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {_RUN_KEY: json.dumps(asdict(self.run)).encode()}
        for name, table in (("contexts", self.contexts), ("features", self.features)):
            pq.write_table(table.replace_schema_metadata(metadata), folder / f"{name}.parquet")

    @classmethod
    def from_parquet(cls, folder: str | Path) -> FeatureTable:
        """Read what `to_parquet` wrote."""
        contexts, features = (
            pq.read_table(Path(folder) / f"{name}.parquet") for name in ("contexts", "features")
        )
        run = json.loads(contexts.schema.metadata[_RUN_KEY])
        options = run["options"] | {"thresholds": tuple(run["options"]["thresholds"])}
        return cls(
            contexts=contexts.replace_schema_metadata(None),
            features=features.replace_schema_metadata(None),
            run=ContextRun(
                **run
                | {
                    "options": ContextOptions(**options),
                    "hook_names": tuple(run["hook_names"]),
                    "counts": tuple(ThresholdCount(*count) for count in run["counts"]),
                }
            ),
        )

    def to_reference_json(self, path: str | Path | None = None) -> dict[str, Any]:
        """The layout of the paper's code: feature -> token class -> contexts; written to `path`."""
        contexts: dict[str, dict[str, list[dict[str, Any]]]] = {}
        columns = ["feature", "token_class", "text", "activation"]
        for row in self.contexts.select(columns).to_pylist():
            of_feature = contexts.setdefault(str(row["feature"]), {})
            of_feature.setdefault(row["token_class"], []).append(
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
        if path is not None:
            text = json.dumps(layout, ensure_ascii=False, indent=4)
            Path(path).write_text(text, encoding="utf-8")
        return layout


def find_contexts(
    sae: RoutedSAE,
    batches: Iterable[ActivationBatch],
    tokenizer: Any,
    options: ContextOptions | None = None,
) -> FeatureTable:
    """Contexts and layer profiles of a RouteSAE's features over a stream of any length.

    Args:
        sae: a RouteSAE whose `metadata.hook_names` name its L source hooks.
        batches: tokens and residual streams, from `model_batches` or anything else.
        tokenizer: the model's Hugging Face tokenizer.
        options: thresholds and filters; the paper's by default.

    Raises:
        ValueError: the metadata does not name one hook per routed layer.
    """
    hook_names = _hook_names(sae)
    collector = ContextCollector(sae.cfg.d_in, sae.cfg.d_sae, hook_names, tokenizer, options)
    with torch.no_grad():
        for tokens, activations, mask in batches:
            # routed whole, encoded in parts: uniform routing draws once per batch
            routing = sae.route(activations.to(sae.device))
            step = max(1, _ENCODE_ELEMENTS // (tokens.shape[1] * sae.cfg.d_sae))
            for first in range(0, len(tokens), step):
                part = slice(first, first + step)
                collector.add(
                    tokens[part],
                    sae.encode(routing.x_route[part]),
                    routing.layer[part],
                    routing.weight[part],
                    None if mask is None else mask[part],
                )
    return collector.table()


def model_batches(
    model: Any, sae: RoutedSAE, token_batches: Iterable[Int[Tensor, "_ _"]]
) -> Iterator[ActivationBatch]:
    """Run a model over batches of token ids, up to its last routed layer, for `find_contexts`.

    Padding belongs on the right, where no earlier token sees it.

    Args:
        model: anything with TransformerLens's `run_with_cache`.
        sae: a RouteSAE whose `metadata.hook_names` are hooks of that model.
        token_batches: token ids [batch, pos], one sequence per row; sizes may differ.
    """
    hook_names = _hook_names(sae)
    stops = [extract_stop_at_layer_from_tlens_hook_name(name) for name in hook_names]
    stop_at_layer = None if None in stops else max(stop for stop in stops if stop is not None)
    for tokens in token_batches:
        with torch.no_grad():
            _, cache = model.run_with_cache(
                tokens, names_filter=list(hook_names), stop_at_layer=stop_at_layer
            )
        yield ActivationBatch(tokens, torch.stack([cache[name] for name in hook_names], dim=2))


def _hook_names(sae: RoutedSAE) -> tuple[str, ...]:
    names = sae.cfg.metadata.hook_names or ()
    if len(names) != sae.cfg.n_routed_layers:
        raise ValueError(
            f"metadata.hook_names names {len(names)} hooks, the SAE routes "
            f"{sae.cfg.n_routed_layers} layers: set one name per routed layer, in order"
        )
    return tuple(names)


class ContextCollector:
    """The running table: `add` batches of feature activations, then read a `table`.

    `find_contexts` feeds it; whoever has feature activations from elsewhere can too.

    Args:
        d_in: width of the SAE's input, for the default threshold.
        d_sae: number of features.
        hook_names: source hooks of the L routed layers, in order.
        tokenizer: the model's Hugging Face tokenizer.
        options: thresholds and filters; the paper's by default.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        hook_names: Sequence[str],
        tokenizer: Any,
        options: ContextOptions | None = None,
    ) -> None:
        options = options or ContextOptions()
        if options.threshold is None:
            options = replace(options, threshold=default_threshold(d_in))
        self.options = options
        self.d_sae = d_sae
        self.hook_names = tuple(hook_names)
        self.n_tokens = 0
        self.n_sequences = 0
        self._vocabulary = Vocabulary.of(tokenizer)
        sentences = ReferenceSentences if options.sentences == "raw_tokens" else DecodedSentences
        self._sentences = sentences(tokenizer, self._vocabulary, options.max_length)
        self._layer_counts = np.zeros(d_sae * len(self.hook_names), dtype=np.int64)
        self._max_activation = np.zeros(d_sae, dtype=np.float32)
        # what a candidate must exceed: the lowest threshold, or more once a feature has N rows
        self._floor = np.full(d_sae, min(self._thresholds), dtype=np.float32)
        # the table, ordered by pair, then falling activation, and where the rest of a row is stored
        self._pair = np.empty(0, dtype=np.int64)
        self._activation = np.empty(0, dtype=np.float32)
        self._slot = np.empty(0, dtype=np.int64)
        self._store = np.empty(
            0, dtype=np.dtype([*_PLACE, ("window", np.int32, (self._sentences.width,))])
        )
        self._free = np.empty(0, dtype=np.int64)
        self._pending = _Pending()

    @property
    def _thresholds(self) -> tuple[float, ...]:
        own = self.options.threshold
        assert own is not None
        return tuple(sorted({own, *self.options.thresholds}))

    @property
    def max_rows(self) -> int:
        """The most rows the table can hold."""
        return self.d_sae * self.options.max_contexts_per_feature

    @property
    def n_rows(self) -> int:
        """Rows the table holds now, and candidates waiting to be merged."""
        return len(self._pair) + self._pending.n_rows

    def add(
        self,
        tokens: Int[Tensor, "batch pos"],
        feature_acts: Float[Tensor, "batch pos d_sae"],
        layer: Int[Tensor, "batch pos"],
        weight: Float[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch pos"] | None = None,
    ) -> None:
        """Take in the next sequences of the stream.

        Args:
            tokens: token ids.
            feature_acts: the SAE's activations of those tokens.
            layer: routed layer of each token, an index into the routed layers.
            weight: route weight of each token.
            mask: False where a token is passed over.
        """
        ids = tokens.cpu().numpy()
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self._vocabulary.raw):
            raise ValueError(f"token ids outside the tokenizer's {len(self._vocabulary.raw)}")
        counted = np.ones(ids.shape, dtype=bool) if mask is None else mask.cpu().numpy()
        if self.options.mask_special_tokens:
            counted = counted & ~self._vocabulary.special[ids]
        first_sequence = self.n_sequences
        self.n_sequences += len(ids)
        self.n_tokens += int(counted.sum())

        token, feature, activation = _active(feature_acts)
        if not counted.all():
            keep = counted.ravel()[token]
            token, feature, activation = token[keep], feature[keep], activation[keep]
        layers = layer.cpu().numpy().ravel()
        n_layers = len(self.hook_names)
        self._layer_counts += np.bincount(
            feature * n_layers + layers[token], minlength=len(self._layer_counts)
        )
        record = activation > self._max_activation[feature]  # few: `maximum.at` is slow
        np.maximum.at(self._max_activation, feature[record], activation[record])

        # at the floor itself a candidate may still win a tie against a later class
        lowest = np.float32(min(self._thresholds))
        keep = (activation > lowest) & (activation >= self._floor[feature])
        token, activation = token[keep], activation[keep]
        pair = feature[keep] * len(self._vocabulary.classes)
        pair += self._vocabulary.class_of[ids.ravel()[token]]
        keep = self._could_enter(pair, activation)
        token, pair, activation = token[keep], pair[keep], activation[keep]

        start, length, before = self._sentences.windows(ids)
        rows = np.empty(len(token), dtype=_CANDIDATE)
        rows["pair"], rows["activation"] = pair, activation
        rows["weight"] = weight.float().cpu().numpy().ravel()[token]
        rows["layer"] = layers[token]
        rows["sequence"], rows["position"] = np.divmod(token, ids.shape[1])
        rows["sequence"] += first_sequence
        rows["start"], rows["length"], rows["before"] = start[token], length[token], before[token]
        self._pending.append(rows, ids)
        if (
            self._pending.n_rows >= max(_MIN_PENDING, len(self._pair) // 2)
            or self._pending.n_tokens >= _MAX_PENDING_TOKENS
        ):
            self._merge()

    def _could_enter(
        self, pair: Int[np.ndarray, " n"], activation: Float32[np.ndarray, " n"]
    ) -> Bool[np.ndarray, " n"]:
        """False for candidates whose class already has as many contexts, all at least as strong."""
        if not len(self._pair):
            return np.ones(len(pair), dtype=bool)
        # sorting the keys first makes the search five times faster: neighbours share cache lines
        order = np.argsort(pair)
        last = np.empty_like(order)
        last[order] = np.searchsorted(self._pair, pair[order]) + self.options.max_per_class - 1
        full = last < len(self._pair)
        last[~full] = 0
        full &= self._pair[last] == pair
        weakest = self._activation[last]
        # an equal activation comes later, so it loses, unless texts decide
        loses = activation < weakest if self._sentences.ties_by_text else activation <= weakest
        return ~(full & loses)

    def _merge(self) -> None:
        """Pending candidates into the table."""
        k, n_old = self.options.max_per_class, len(self._pair)
        candidates, windows = self._pending.take(self._sentences.width)
        self._pending = _Pending()
        # this sort is stable and candidates stand in the order of the stream, behind the table's
        # rows: of equal activations the earlier stays in front
        order = np.lexsort((-candidates["activation"], candidates["pair"]))
        new_pair, new_activation = candidates["pair"][order], candidates["activation"][order]
        at = first = np.searchsorted(self._pair, new_pair)
        for i in range(min(k, n_old)):  # behind the rows of the same pair that are as strong
            row = np.minimum(first + i, n_old - 1)
            stronger = (self._pair[row] == new_pair) & (self._activation[row] >= new_activation)
            at = at + (stronger & (first + i < n_old))
        pair = np.insert(self._pair, at, new_pair)
        activation = np.insert(self._activation, at, new_activation)
        source = np.insert(np.arange(n_old), at, n_old + order)
        if self._sentences.ties_by_text:
            self._order_ties_by_text(pair, activation, source, candidates, windows)

        keep = np.flatnonzero(_rank_in_group(pair) < k)
        keep = keep[self._within_cap(pair[keep], activation[keep])]
        self._pair, self._activation, source = pair[keep], activation[keep], source[keep]

        old = source < n_old
        stays = np.zeros(n_old, dtype=bool)
        stays[source[old]] = True
        slot = np.empty(len(source), dtype=np.int64)
        slot[old] = self._slot[source[old]]
        slot[~old] = new = self._take_slots(int((~old).sum()), self._slot[~stays])
        self._slot = slot
        entered = candidates[source[~old] - n_old]
        for name, _ in _PLACE:
            self._store[name][new] = entered[name]
        self._store["window"][new] = windows[entered["start"]]

    def _within_cap(
        self, pair: Int[np.ndarray, " n"], activation: Float32[np.ndarray, " n"]
    ) -> Bool[np.ndarray, " n"]:
        """True for the N strongest rows of each feature, and raises the floor of full features.

        Rows are ordered by pair; of equal activations at the cut, the first ones stay.
        """
        cap = self.options.max_contexts_per_feature
        feature = pair // len(self._vocabulary.classes)
        count = np.bincount(feature, minlength=self.d_sae)
        if count.max(initial=0) <= cap:
            return np.ones(len(pair), dtype=bool)
        # bits of positive floats order as the floats do; one sort of integers gives every feature's
        # activations from the strongest down
        falling = np.sort(
            (feature << 32) | (0xFFFFFFFF - activation.view(np.uint32).astype(np.int64))
        )
        full = np.flatnonzero(count > cap)
        weakest = falling[np.cumsum(count)[full] - count[full] + cap - 1]
        floor = (0xFFFFFFFF - (weakest & 0xFFFFFFFF)).astype(np.uint32).view(np.float32)
        self._floor[full] = floor
        limit = np.full(self.d_sae, -1, dtype=np.float32)
        limit[full] = floor
        keep = activation > limit[feature]
        room = cap - np.bincount(feature[keep], minlength=self.d_sae)
        at_limit = np.flatnonzero(activation == limit[feature])
        tied = feature[at_limit]
        keep[at_limit[_rank_in_group(tied) < room[tied]]] = True
        return keep

    def _take_slots(self, n: int, freed: Int[np.ndarray, " m"]) -> Int[np.ndarray, " n"]:
        """Rows of the store for n contexts that enter, after others have left theirs."""
        free = np.concatenate([self._free, freed])
        if n > len(free):
            size = len(self._store)
            # doubled, so that growing costs little; no more than can ever be needed
            grown = max(size + n - len(free), min(2 * size, self.max_rows))
            free = np.concatenate([free, np.arange(size, grown)])
            store = np.empty(grown, dtype=self._store.dtype)
            store[:size] = self._store
            self._store = store
        self._free = free[n:]
        return free[:n]

    def _order_ties_by_text(
        self,
        pair: Int[np.ndarray, " n"],
        activation: Float32[np.ndarray, " n"],
        source: Int[np.ndarray, " n"],
        candidates: np.ndarray,
        windows: Int[np.ndarray, "m width"],
    ) -> None:
        """The reference keeps the largest (activation, text): where equal activations stand on
        both sides of the cut, put their sources in falling order of text, in place."""
        rank, k, n_old = _rank_in_group(pair), self.options.max_per_class, len(self._pair)
        new_tie = np.ones(len(pair), dtype=bool)
        new_tie[1:] = (pair[1:] != pair[:-1]) | (activation[1:] != activation[:-1])
        first = np.flatnonzero(new_tie)
        last = np.append(first[1:], len(pair)) - 1
        cut = (rank[first] < k) & (rank[last] >= k)

        def text(row: int) -> str:
            if row < n_old:
                place = self._store[self._slot[row]]
                window = place["window"]
            else:
                place = candidates[row - n_old]
                window = windows[place["start"]]
            return self._sentences.text(window[: place["length"]].tolist(), int(place["before"]))

        for a, b in zip(first[cut].tolist(), last[cut].tolist(), strict=True):
            source[a : b + 1] = sorted(source[a : b + 1].tolist(), key=text, reverse=True)

    def table(self, threshold: float | None = None) -> FeatureTable:
        """Contexts at one threshold, counts at every threshold, and the profiles so far.

        Args:
            threshold: `options.threshold` or one of `options.thresholds`; None is the former.

        Raises:
            ValueError: it is neither.
        """
        options = self.options if threshold is None else replace(self.options, threshold=threshold)
        if options.threshold not in self._thresholds:
            known = ", ".join(f"{known:g}" for known in self._thresholds)
            raise ValueError(f"threshold={threshold}: contexts were collected at {known}")
        if self._pending.n_rows:
            self._merge()
        n_classes = len(self._vocabulary.classes)
        feature, token_class = np.divmod(self._pair, n_classes)
        counts = []
        at_own: _Above | None = None
        for at in self._thresholds:
            above = self._above(at, feature)
            n_features = int(above.passes.sum())
            counts.append(ThresholdCount(at, n_features, int(above.n_contexts[above.passes].sum())))
            if at == options.threshold:
                at_own = above
        assert at_own is not None
        kept = np.flatnonzero(at_own.rows & at_own.passes[feature])
        return FeatureTable(
            contexts=self._contexts(kept, feature[kept], token_class[kept]),
            features=self._profiles(at_own),
            run=ContextRun(
                options=options,
                hook_names=self.hook_names,
                d_sae=self.d_sae,
                n_tokens=self.n_tokens,
                n_sequences=self.n_sequences,
                counts=tuple(counts),
            ),
        )

    def _above(self, threshold: float, feature: Int[np.ndarray, " rows"]) -> _Above:
        options, pair = self.options, self._pair
        rows = self._activation > np.float32(threshold)
        # the first row of a pair is its strongest
        first = np.ones(len(pair), dtype=bool)
        first[1:] = pair[1:] != pair[:-1]
        n_contexts = np.bincount(feature[rows], minlength=self.d_sae)
        n_classes = np.bincount(feature[rows & first], minlength=self.d_sae)
        passes = n_contexts >= options.min_contexts
        if options.max_classes is not None:
            passes &= n_classes <= options.max_classes
        return _Above(rows, n_contexts, n_classes, passes)

    def _contexts(
        self,
        kept: Int[np.ndarray, " n"],
        feature: Int[np.ndarray, " n"],
        token_class: Int[np.ndarray, " n"],
    ) -> pa.Table:
        places = self._store[self._slot[kept]]
        texts, activated = [], []
        for window, length, before in zip(
            places["window"], places["length"].tolist(), places["before"].tolist(), strict=True
        ):
            ids = window[:length].tolist()
            texts.append(self._sentences.text(ids, before))
            activated.append(self._vocabulary.pieces[ids[before]])
        columns = [
            feature,
            [self._vocabulary.classes[i] for i in token_class.tolist()],
            activated,
            self._activation[kept],
            places["layer"],
            [self.hook_names[i] for i in places["layer"].tolist()],
            places["weight"],
            texts,
            places["sequence"],
            places["position"],
        ]
        table = pa.table(
            [pa.array(c, type=f.type) for c, f in zip(columns, _CONTEXT_SCHEMA, strict=True)],
            schema=_CONTEXT_SCHEMA,
        )
        if self._sentences.ties_by_text:
            by = [("feature", "ascending"), ("token_class", "ascending")]
            table = table.sort_by([*by, ("activation", "descending"), ("text", "ascending")])
        return table

    def _profiles(self, above: _Above) -> pa.Table:
        counts = self._layer_counts.reshape(self.d_sae, len(self.hook_names))
        fired = counts.sum(1)
        share = counts / np.maximum(fired, 1)[:, None]
        mean_layer = share @ np.arange(len(self.hook_names))
        entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(1)
        depth = np.where(mean_layer < (len(self.hook_names) - 1) / 2, "shallow", "deep")
        silent = fired == 0

        def unless_silent(values: np.ndarray) -> list[Any]:
            return [None if s else v for v, s in zip(values.tolist(), silent, strict=True)]

        columns = [
            np.arange(self.d_sae),
            above.passes,
            above.n_contexts,
            above.n_classes,
            fired,
            fired / max(self.n_tokens, 1),
            self._max_activation,
            counts.tolist(),
            unless_silent(share),
            unless_silent(mean_layer),
            unless_silent(entropy),
            unless_silent(depth),
        ]
        return pa.table(
            [pa.array(c, type=f.type) for c, f in zip(columns, _FEATURE_SCHEMA, strict=True)],
            schema=_FEATURE_SCHEMA,
        )


class _Above(NamedTuple):
    """The table seen from one threshold."""

    rows: Bool[np.ndarray, " rows"]
    """Rows above it."""
    n_contexts: Int[np.ndarray, " d_sae"]
    n_classes: Int[np.ndarray, " d_sae"]
    passes: Bool[np.ndarray, " d_sae"]
    """Features that pass the filters."""


@dataclass
class _Pending:
    """Candidates that wait for a merge, and the tokens their windows are cut from."""

    rows: list[np.ndarray] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)
    n_rows: int = 0
    n_tokens: int = 0

    def append(self, rows: np.ndarray, ids: Int[np.ndarray, "batch pos"]) -> None:
        if not len(rows):
            return
        rows["start"] += self.n_tokens
        self.rows.append(rows)
        self.tokens.append(ids.astype(np.int32).ravel())
        self.n_rows += len(rows)
        self.n_tokens += ids.size

    def take(self, width: int) -> tuple[np.ndarray, Int[np.ndarray, "m width"]]:
        """The candidates, and a view of the tokens whose row i is the window that starts at i."""
        beyond = np.zeros(width, dtype=np.int32)
        tokens = np.concatenate([*self.tokens, beyond])
        return np.concatenate(self.rows), np.lib.stride_tricks.sliding_window_view(tokens, width)


def _active(
    feature_acts: Float[Tensor, "batch pos d_sae"],
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """Token index, feature and value of every activation above 0, in the order of the stream."""
    if feature_acts.is_sparse:
        feature_acts = feature_acts.to_dense()
    flat = feature_acts.detach().float().reshape(-1)
    if flat.device.type == "cpu":
        # 2 ms for 2048 x 2048 where torch's nonzero takes 24
        values = flat.numpy()
        at = np.flatnonzero(values > 0)
        active = values[at]
    else:
        on_device = (flat > 0).nonzero().squeeze(1)
        at, active = on_device.cpu().numpy(), flat[on_device].cpu().numpy()
    token, feature = np.divmod(at, feature_acts.shape[-1])
    return token, feature, active


def _rank_in_group(group: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """0, 1, 2, ... within each run of equal values."""
    index = np.arange(len(group))
    starts = np.ones(len(group), dtype=bool)
    starts[1:] = group[1:] != group[:-1]
    return index - np.maximum.accumulate(np.where(starts, index, 0))
