"""Pages to look at features in a browser: one HTML file each, which opens without a network.

`write_dashboard` writes our own page. Per feature: how strongly it fires, at which blocks, and its
strongest contexts with the block every token was routed to. Per text: the route probabilities of
every token. Over the data: the routed shares, and an index to search and sort.

1. Collect: one pass of the model; every activation above 0 is kept as (feature, token, value), 12
   bytes each and twice that while they are sorted, beside 23 bytes per token. Naming `features`
   keeps only theirs. Special tokens and those that training left out are passed over.
2. Summarise: the features that were asked for (the strongest ones by default) become plain numbers.
3. Write: the numbers are embedded as JSON, beside plotly. The page draws a feature when it is
   selected; `page.html#feature=12` opens on feature 12.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from plotly.offline import get_plotlyjs
from sae_lens.util import get_special_token_ids
from torch import Tensor

from sae_lens_route.activations import RoutedActivationsStore
from sae_lens_route.features import model_batches
from sae_lens_route.interpret import Answer, OfflineScore
from sae_lens_route.models import LanguageModel
from sae_lens_route.router import Routing
from sae_lens_route.saes import RoutedSAE

N_FEATURES = 32
N_BINS = 40
N_CONTEXTS = 16
CONTEXT_TOKENS = 48
N_TEXTS = 4
TEXT_TOKENS = 96
VIOLIN_POINTS = 200
_BATCH_SIZE = 8

Score = int | float | Answer | OfflineScore
"""What a judge made of a feature: a number, an answer, or the statistic that needs no judge."""


def write_dashboard(
    model: LanguageModel,
    sae: RoutedSAE,
    tokens: Int[Tensor, "n pos"] | RoutedActivationsStore,
    path: str | Path,
    *,
    features: Sequence[int] | None = None,
    n_features: int = N_FEATURES,
    judge_scores: Mapping[int, Score] | None = None,
    texts: Sequence[str] | None = None,
    max_tokens: int = 50_000,
) -> Path:
    """Write one self-contained page about a selection of features; gives back its path.

    Args:
        model: the model `sae` was trained on, with its tokenizer.
        sae: a RouteSAE whose metadata names its source hooks.
        tokens: token ids, one sequence per row, or a store to read from.
        path: the HTML file; its folder is made if missing.
        features: which ones, in this order; None takes the `n_features` with the largest maxima.
        n_features: how many to take when `features` is None.
        judge_scores: feature -> score, shown in the index.
        texts: texts to show the routing of; None shows the first sequences of `tokens`.
        max_tokens: how much to read of a store.

    Raises:
        ValueError: a feature the SAE does not have, no tokens, or a model without a tokenizer.
    """
    data = dashboard_data(
        model,
        sae,
        tokens,
        features=features,
        n_features=n_features,
        judge_scores=judge_scores,
        texts=texts,
        max_tokens=max_tokens,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dashboard_html(data), encoding="utf-8")
    return path


def dashboard_data(
    model: LanguageModel,
    sae: RoutedSAE,
    tokens: Int[Tensor, "n pos"] | RoutedActivationsStore,
    *,
    features: Sequence[int] | None = None,
    n_features: int = N_FEATURES,
    judge_scores: Mapping[int, Score] | None = None,
    texts: Sequence[str] | None = None,
    max_tokens: int = 50_000,
) -> dict[str, Any]:
    """The numbers of `write_dashboard`'s page, as they are embedded in it (same arguments)."""
    tokenizer = tokenizer_of(model)
    check_features(features, sae.cfg.d_sae)
    batches, passed_over = tensor_batches(tokens, max_tokens), passed_over_ids(sae, tokenizer)
    seen = collect_activations(model, sae, batches, passed_over, features)
    chosen = (
        strongest_features(seen, n_features) if features is None else list(dict.fromkeys(features))
    )
    words = _Words(tokenizer)
    scores = judge_scores or {}
    entries = [_feature(seen, feature, scores.get(feature), words) for feature in chosen]
    if texts is None:
        shown = [_text(ids, routing, words) for ids, routing in seen.first_texts]
    else:
        shown = [_text(*route_text(model, sae, text), words) for text in texts]
    metadata = sae.cfg.metadata
    n_counted = int(seen.counted.sum())
    counts = np.bincount(seen.layer[seen.counted], minlength=seen.n_layers)
    offline = any(isinstance(score, OfflineScore) for score in scores.values())
    return {
        "model": metadata.model_name or "",
        "architecture": sae.cfg.architecture(),
        "routing": sae.cfg.routing,
        "d_sae": sae.cfg.d_sae,
        "hook_names": list(metadata.hook_names or ()),
        "blocks": _blocks(sae),
        "n_tokens": n_counted,
        "n_sequences": int(seen.sequence[-1]) + 1,
        "share": [_short(count / n_counted) for count in counts],
        "mean_probs": [_short(total / n_counted) for total in seen.probs_sum],
        "score_name": "offline score" if offline else "judge score",
        "features": entries,
        "texts": shown,
        # last, when every token has its place
        "words": words.pieces,
    }


def dashboard_html(data: Mapping[str, Any]) -> str:
    """The page around the numbers of `dashboard_data`.

    Its policy forbids every connection, so a page that works needs no network. Text of the data
    reaches the document as text only: `<` is written as an escape in the JSON.
    """
    parts = {
        "TITLE": escape(f"RouteSAE features: {data['model']}"),
        "STYLE": page_file("style.css"),
        "PLOTLY": get_plotlyjs(),
        "DATA": _json_for_html(data),
        "SCRIPT": page_file("script.js"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page_file("page.html"))


def route_heatmap(model: LanguageModel, sae: RoutedSAE, text: str) -> go.Figure:
    """Route probabilities of a text, token by block, with the chosen block marked."""
    words = _Words(tokenizer_of(model))
    ids, routing = route_text(model, sae, text)
    shown = _text(ids, routing, words, len(ids))
    labels = [escape(_visible(words.pieces[i]), quote=False) for i in shown["tokens"]]
    blocks = [str(block) for block in _blocks(sae)]
    at = list(range(len(labels)))
    figure = go.Figure()
    figure.add_heatmap(
        z=np.array(shown["probs"]).T,
        x=at,
        y=blocks,
        customdata=[labels] * len(blocks),
        colorscale="Blues",
        zmin=0,
        colorbar={"title": "p"},
        hovertemplate="%{customdata}<br>block %{y}: p = %{z:.3f}<extra></extra>",
    )
    figure.add_scatter(
        x=at,
        y=[blocks[layer] for layer in shown["layer"]],
        mode="markers",
        marker={"symbol": "square-open", "size": 9, "color": "#cc3311", "line": {"width": 2}},
        name="chosen block",
        hoverinfo="skip",
    )
    figure.update_layout(
        template="plotly_white",
        title="Route probabilities",
        yaxis={"title": "block", "type": "category"},
        xaxis={
            "tickvals": at,
            "ticktext": labels,
            "tickangle": -60,
            "range": [-0.5, len(labels) - 0.5],
        },
        height=150 + 26 * len(blocks),
        width=max(500, 160 + 18 * len(labels)),
    )
    return figure


@torch.no_grad()
def route_text(
    model: LanguageModel, sae: RoutedSAE, text: str
) -> tuple[Int[np.ndarray, " pos"], Routing]:
    """Token ids of a text and how each of them is routed (no batch axis).

    BOS is put in front as in training, and the text is cut to the context of the training.
    """
    tokenizer, metadata = tokenizer_of(model), sae.cfg.metadata
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if metadata.prepend_bos is not False and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    if not ids:
        raise ValueError("the text has no tokens")
    tokens = torch.tensor([ids[: metadata.context_size or None]], device=_device(model))
    (batch,) = model_batches(model, sae, [tokens])
    routing = sae.route(batch.activations.to(sae.device))
    return tokens[0].cpu().numpy(), Routing(*(part[0] for part in routing))


# --- collecting ----------------------------------------------------------------------------------


@dataclass
class Seen:
    """Everything one pass of the model showed; arrays over tokens and over activations."""

    n_layers: int
    ids: Int[np.ndarray, " tokens"]
    sequence: Int[np.ndarray, " tokens"]
    position: Int[np.ndarray, " tokens"]
    counted: Bool[np.ndarray, " tokens"]
    """False where a token is passed over."""
    layer: Int[np.ndarray, " tokens"]
    weight: Float[np.ndarray, " tokens"]
    probs_sum: Float[np.ndarray, " L"]
    """Route probabilities, summed over the counted tokens."""
    first_texts: list[tuple[Int[np.ndarray, " pos"], Routing]]
    feature: Int[np.ndarray, " active"]
    """Ascending; within a feature, tokens ascend."""
    token: Int[np.ndarray, " active"]
    value: Float[np.ndarray, " active"]

    def activations(self, feature: int) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Tokens on which a feature fires, and how strongly."""
        first, last = np.searchsorted(self.feature, [feature, feature + 1])
        return self.token[first:last], self.value[first:last]


def tensor_batches(
    tokens: Int[Tensor, "n pos"] | RoutedActivationsStore, max_tokens: int
) -> Iterable[Int[Tensor, "_ _"]]:
    """Token ids in batches; `max_tokens` bounds what is read of a store."""
    if isinstance(tokens, Tensor):
        return tokens.split(_BATCH_SIZE)
    return tokens.token_batches(max_tokens)


def passed_over_ids(sae: RoutedSAE, tokenizer: Any) -> Int[Tensor, " ids"]:
    """Special tokens, and what training left out."""
    excluded = sae.cfg.metadata.exclude_special_tokens
    ids = set(tokenizer.all_special_ids)
    if excluded is True:
        ids |= set(get_special_token_ids(tokenizer))
    elif excluded:
        ids |= set(excluded)
    return torch.tensor(sorted(ids), dtype=torch.long)


@torch.no_grad()
def collect_activations(
    model: LanguageModel,
    sae: RoutedSAE,
    token_batches: Iterable[Int[Tensor, "_ _"]],
    passed_over: Int[Tensor, " ids"],
    features: Sequence[int] | None,
) -> Seen:
    """Run the model once over the tokens; `features=None` keeps the activations of all."""
    only = None if features is None else torch.tensor(sorted(set(features)), dtype=torch.long)
    columns: dict[str, list[np.ndarray]] = {field.name: [] for field in fields(Seen)}
    probs_sum = np.zeros(sae.cfg.n_routed_layers)
    first_texts: list[tuple[np.ndarray, Routing]] = []
    n_tokens = n_sequences = 0
    for ids, activations, _ in model_batches(
        model, sae, (batch.to(_device(model)) for batch in token_batches)
    ):
        routing = sae.route(activations.to(sae.device))
        counted = torch.isin(ids.cpu(), passed_over, invert=True)
        acts = sae.encode(routing.x_route)
        acts = acts.to_dense() if acts.is_sparse else acts
        acts = (acts if only is None else acts[..., only.to(acts.device)]).float().cpu()
        acts = acts.masked_fill(~counted.unsqueeze(-1), 0).flatten(0, 1).numpy()
        at = np.flatnonzero(acts > 0)
        token, feature = np.divmod(at, acts.shape[1])
        rows, positions = np.indices(ids.shape, dtype=np.int32)
        for name, values in {
            "ids": ids.cpu().numpy().ravel(),
            "sequence": rows.ravel() + n_sequences,
            "position": positions.ravel(),
            "counted": counted.numpy().ravel(),
            "layer": routing.layer.cpu().numpy().ravel().astype(np.int16),
            "weight": routing.weight.float().cpu().numpy().ravel(),
            "feature": (feature if only is None else only.numpy()[feature]).astype(np.int32),
            "token": (token + n_tokens).astype(np.int32),
            "value": acts.ravel()[at],
        }.items():
            columns[name].append(values)
        probs_sum += routing.probs.cpu().double()[counted].sum(0).numpy()
        for row in range(min(len(ids), N_TEXTS - len(first_texts))):
            of_row = Routing(*(part[row, :TEXT_TOKENS].clone() for part in routing))
            first_texts.append((ids[row, :TEXT_TOKENS].cpu().numpy(), of_row))
        n_tokens += ids.numel()
        n_sequences += len(ids)
    joined = {name: np.concatenate(parts) for name, parts in columns.items() if parts}
    if not joined or not joined["counted"].any():
        raise ValueError("no tokens to show: the data gave none that are not special or excluded")
    order = np.argsort(joined["feature"], kind="stable")
    for name in ("feature", "token", "value"):
        joined[name] = joined[name][order]
    return Seen(
        n_layers=sae.cfg.n_routed_layers, probs_sum=probs_sum, first_texts=first_texts, **joined
    )


def strongest_features(seen: Seen, n: int) -> list[int]:
    """The features with the largest activations, the strongest first."""
    found, first = np.unique(seen.feature, return_index=True)
    if not len(found):
        raise ValueError("no feature is active on these tokens")
    maximum = np.maximum.reduceat(seen.value, first)
    return found[np.argsort(-maximum, kind="stable")[:n]].tolist()


def check_features(features: Sequence[int] | None, d_sae: int) -> None:
    """Raise ValueError unless these are features of the SAE, at least one, or None."""
    if features is not None and not features:
        raise ValueError("features=[]: give at least one, or None for the strongest")
    outside = [feature for feature in features or () if not 0 <= feature < d_sae]
    if outside:
        raise ValueError(f"features={outside}: the SAE has features 0 to {d_sae - 1}")


def tokenizer_of(model: LanguageModel) -> Any:
    """The model's tokenizer; ValueError if it has none."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("the model has no tokenizer, and a page shows tokens: set model.tokenizer")
    return tokenizer


def _device(model: LanguageModel) -> torch.device:
    return next(model.parameters()).device


def _blocks(sae: RoutedSAE) -> list[int]:
    """Block numbers of the routed layers, read off the names of their hooks."""
    found = [re.search(r"\.(\d+)(?:\.|$)", name) for name in sae.cfg.metadata.hook_names or ()]
    return [i if match is None else int(match[1]) for i, match in enumerate(found)]


# --- summarising ---------------------------------------------------------------------------------


class _Words:
    """The tokens that occur in a page, each written once; elsewhere stand their indices."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._index: dict[int, int] = {}
        self.pieces: list[str] = []

    def indices(self, ids: Int[np.ndarray, " n"]) -> list[int]:
        return [self._index_of(token) for token in ids.tolist()]

    def _index_of(self, token: int) -> int:
        if token not in self._index:
            self._index[token] = len(self.pieces)
            raw = self._tokenizer.convert_ids_to_tokens(token) or ""
            piece = self._tokenizer.convert_tokens_to_string([raw])
            # SentencePiece drops the space at the start of a text
            marked = raw.startswith("▁") and not piece.startswith(" ")
            self.pieces.append(f" {piece}" if marked else piece)
        return self._index[token]


def _visible(piece: str) -> str:
    """A token as a label: white space that would not show becomes a sign."""
    shown = piece.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")
    return shown if shown.strip() else shown.replace(" ", "␣")


def _short(value: float) -> float:
    """Six significant digits, so that a page stays small."""
    return float(f"{value:.6g}")


def _feature(seen: Seen, feature: int, score: Score | None, words: _Words) -> dict[str, Any]:
    token, value = seen.activations(feature)
    layer = seen.layer[token]
    counts = np.bincount(layer, minlength=seen.n_layers)
    maximum = float(value.max(initial=0.0))
    bins = np.histogram(value, bins=N_BINS, range=(0.0, maximum or 1.0))[0]
    contexts = _contexts(seen, token, value, words)
    return {
        "feature": feature,
        "n_fired": len(token),
        "density": _short(len(token) / int(seen.counted.sum())),
        "max_activation": maximum,
        "mean_layer": _short(float(layer.mean())) if len(token) else None,
        "histogram": bins.tolist(),
        "layer_counts": counts.tolist(),
        "violin": [_order_statistics(value[layer == i]) for i in range(seen.n_layers)],
        "contexts": contexts,
        **_score(score),
    }


def _score(score: Score | None) -> dict[str, Any]:
    if isinstance(score, Answer):
        return {
            "score": score.score,
            "category": score.category,
            "explanation": score.explanation,
        }
    if isinstance(score, OfflineScore):
        score = score.score
    return {"score": None if score is None else _short(float(score))}


def _order_statistics(values: Float[np.ndarray, " n"]) -> list[float]:
    """The values in order, at most 200 evenly spaced ones: the distribution, minimum to maximum."""
    ordered = np.sort(values)
    if len(ordered) > VIOLIN_POINTS:
        ordered = ordered[np.linspace(0, len(ordered) - 1, VIOLIN_POINTS).round().astype(int)]
    return [_short(value) for value in ordered.tolist()]


def _contexts(
    seen: Seen, token: Int[np.ndarray, " n"], value: Float[np.ndarray, " n"], words: _Words
) -> list[dict[str, Any]]:
    """The strongest places, each with the tokens around it; no two in the same half window."""
    contexts: list[dict[str, Any]] = []
    taken: list[int] = []
    half = CONTEXT_TOKENS // 2
    for i in np.argsort(-value, kind="stable").tolist():
        at = int(token[i])
        sequence = seen.sequence[at]
        if any(abs(at - other) < half and seen.sequence[other] == sequence for other in taken):
            continue
        taken.append(at)
        first = max(at - half, at - int(seen.position[at]))
        last = at + 1
        while last < min(at + half, len(seen.ids)) and seen.sequence[last] == sequence:
            last += 1
        acts = np.zeros(last - first)
        inside = (token >= first) & (token < last)
        acts[token[inside] - first] = value[inside]
        # -1 marks a token that was passed over
        layer = np.where(seen.counted[first:last], seen.layer[first:last], -1)
        contexts.append(
            {
                "sequence": int(sequence),
                "position": int(seen.position[at]),
                "at": at - first,
                "tokens": words.indices(seen.ids[first:last]),
                "acts": [_short(act) for act in acts.tolist()],
                "layer": layer.tolist(),
                "weight": [round(w, 3) for w in seen.weight[first:last].tolist()],
            }
        )
        if len(contexts) == N_CONTEXTS:
            break
    return contexts


def _text(
    ids: Int[np.ndarray, " pos"], routing: Routing, words: _Words, max_tokens: int = TEXT_TOKENS
) -> dict[str, Any]:
    return {
        "tokens": words.indices(ids[:max_tokens]),
        "probs": [[round(p, 4) for p in row] for row in routing.probs[:max_tokens].tolist()],
        "layer": routing.layer[:max_tokens].tolist(),
    }


# --- the page ------------------------------------------------------------------------------------


def _json_for_html(data: Any) -> str:
    """JSON that can stand in a script element whatever text is in it."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def page_file(name: str) -> str:
    """One of the texts that pages are put together from."""
    return (files("sae_lens_route") / "page" / name).read_text(encoding="utf-8")
