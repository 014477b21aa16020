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

`sae_dashboard_pages` writes SAEDashboard's page for the plain SAE behind the router, run at the
routed hook, and makes that page self-contained too.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from plotly.offline import get_plotlyjs
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAE, TrainingSAE
from sae_lens.util import get_special_token_ids
from torch import Tensor

from sae_lens_route.activations import RoutedActivationsStore
from sae_lens_route.features import model_batches
from sae_lens_route.interpret import Answer, OfflineScore
from sae_lens_route.models import LanguageModel
from sae_lens_route.router import Routing
from sae_lens_route.saes import RoutedSAE
from sae_lens_route.splice import attach

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
    tokenizer = _tokenizer(model)
    _check_features(features, sae.cfg.d_sae)
    batches, passed_over = _batches(tokens, max_tokens), _passed_over(sae, tokenizer)
    seen = _collect(model, sae, batches, passed_over, features)
    chosen = _strongest(seen, n_features) if features is None else list(dict.fromkeys(features))
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
        "STYLE": _STYLE,
        "PLOTLY": get_plotlyjs(),
        "DATA": _json_for_html(data),
        "SCRIPT": _SCRIPT,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _PAGE)


def route_heatmap(model: LanguageModel, sae: RoutedSAE, text: str) -> go.Figure:
    """Route probabilities of a text, token by block, with the chosen block marked."""
    words = _Words(_tokenizer(model))
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
    tokenizer, metadata = _tokenizer(model), sae.cfg.metadata
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
class _Seen:
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


def _batches(
    tokens: Int[Tensor, "n pos"] | RoutedActivationsStore, max_tokens: int
) -> Iterable[Int[Tensor, "_ _"]]:
    if isinstance(tokens, Tensor):
        return tokens.split(_BATCH_SIZE)
    return tokens.token_batches(max_tokens)


def _passed_over(sae: RoutedSAE, tokenizer: Any) -> Int[Tensor, " ids"]:
    """Special tokens, and what training left out."""
    excluded = sae.cfg.metadata.exclude_special_tokens
    ids = set(tokenizer.all_special_ids)
    if excluded is True:
        ids |= set(get_special_token_ids(tokenizer))
    elif excluded:
        ids |= set(excluded)
    return torch.tensor(sorted(ids), dtype=torch.long)


@torch.no_grad()
def _collect(
    model: LanguageModel,
    sae: RoutedSAE,
    token_batches: Iterable[Int[Tensor, "_ _"]],
    passed_over: Int[Tensor, " ids"],
    features: Sequence[int] | None,
) -> _Seen:
    only = None if features is None else torch.tensor(sorted(set(features)), dtype=torch.long)
    columns: dict[str, list[np.ndarray]] = {field.name: [] for field in fields(_Seen)}
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
    return _Seen(
        n_layers=sae.cfg.n_routed_layers, probs_sum=probs_sum, first_texts=first_texts, **joined
    )


def _strongest(seen: _Seen, n: int) -> list[int]:
    """The features with the largest activations, the strongest first."""
    found, first = np.unique(seen.feature, return_index=True)
    if not len(found):
        raise ValueError("no feature is active on these tokens")
    maximum = np.maximum.reduceat(seen.value, first)
    return found[np.argsort(-maximum, kind="stable")[:n]].tolist()


def _check_features(features: Sequence[int] | None, d_sae: int) -> None:
    if features is not None and not features:
        raise ValueError("features=[]: give at least one, or None for the strongest")
    outside = [feature for feature in features or () if not 0 <= feature < d_sae]
    if outside:
        raise ValueError(f"features={outside}: the SAE has features 0 to {d_sae - 1}")


def _tokenizer(model: LanguageModel) -> Any:
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


def _feature(seen: _Seen, feature: int, score: Score | None, words: _Words) -> dict[str, Any]:
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
    seen: _Seen, token: Int[np.ndarray, " n"], value: Float[np.ndarray, " n"], words: _Words
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


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';
 script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{TITLE}}</title>
<style>{{STYLE}}</style>
</head>
<body>
<header><h1>RouteSAE features</h1><p id="about"></p></header>
<div id="columns">
<aside>
<input id="search" type="search" placeholder="search number, token, explanation"
 aria-label="search features">
<div id="index-box"><table id="index"><thead><tr></tr></thead><tbody></tbody></table></div>
</aside>
<main>
<section class="card">
<div id="bar">
<button id="previous" title="previous feature">◀</button>
<select id="selector" aria-label="feature"></select>
<button id="next" title="next feature">▶</button>
<span id="numbers"></span>
</div>
<p id="explanation"></p>
<div class="plots">
<div id="histogram"></div><div id="layers"></div><div id="violin"></div>
</div>
</section>
<section class="card">
<h2>Strongest contexts</h2>
<p class="note">Colour: activation of the feature. Hover over a token for its activation, the block
it was routed to and the route weight.</p>
<div id="contexts"></div>
</section>
<section class="card">
<div class="row"><h2>Route probabilities</h2><select id="texts" aria-label="text"></select></div>
<p class="note">Token by block; the square marks the chosen block.</p>
<div class="scroll"><div id="heatmap"></div></div>
</section>
<section class="card"><h2>Routed shares of the data</h2><div id="shares"></div></section>
</main>
</div>
<script>{{PLOTLY}}</script>
<script id="data" type="application/json">{{DATA}}</script>
<script>{{SCRIPT}}</script>
</body>
</html>
"""

_STYLE = """
:root { --line: #dde1e6; --ink: #1f2933; --soft: #66707c; --blue: #33658a; }
* { box-sizing: border-box; }
body { margin: 0; font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: #f5f6f8; }
header { padding: 10px 20px; background: #fff; border-bottom: 1px solid var(--line); }
h1 { font-size: 18px; margin: 0; } h2 { font-size: 15px; margin: 0 0 4px; }
#about, .note { color: var(--soft); margin: 2px 0 6px; font-size: 12.5px; }
#columns { display: flex; align-items: flex-start; gap: 14px; padding: 14px 20px; }
aside { flex: 0 0 400px; position: sticky; top: 14px; }
main { flex: 1 1 0; min-width: 0; }
.card, #index-box { background: #fff; border: 1px solid var(--line); border-radius: 6px; }
.card { padding: 12px 14px; margin-bottom: 14px; }
#search { width: 100%; padding: 6px 8px; margin-bottom: 8px; border: 1px solid var(--line);
  border-radius: 6px; font: inherit; }
#index-box { max-height: calc(100vh - 80px); overflow-y: auto; }
#index { border-collapse: collapse; width: 100%; font-size: 12.5px; }
#index th { position: sticky; top: 0; background: #fff; cursor: pointer; text-align: right;
  padding: 6px; border-bottom: 1px solid var(--line); white-space: nowrap; user-select: none; }
#index td { text-align: right; padding: 3px 6px; font-variant-numeric: tabular-nums; }
#index th:last-child, #index td:last-child { text-align: left; }
#index td:last-child { max-width: 110px; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; font-family: ui-monospace, monospace; }
#index tbody tr { cursor: pointer; } #index tbody tr:hover { background: #eef3f7; }
#index tr.selected { background: #dbe8f2 !important; font-weight: 600; }
#bar, .row { display: flex; align-items: center; gap: 8px; flex-wrap: wrap; }
#bar select, #bar button, .row select { font: inherit; padding: 3px 8px; max-width: 420px; }
#numbers { color: var(--soft); } #explanation { margin: 6px 0 0; } #explanation:empty { margin: 0; }
.plots { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); }
.plots > div { height: 250px; }
.strip { padding: 5px 0; border-top: 1px solid #eef0f2; font-family: ui-monospace, monospace;
  font-size: 12.5px; line-height: 1.75; white-space: pre-wrap; overflow-wrap: anywhere; }
.strip .place { color: var(--soft); font: 11px system-ui, sans-serif; margin-right: 8px;
  display: inline-block; min-width: 120px; }
.token { border-radius: 2px; padding: 2px 0; } .token:hover { outline: 1px solid var(--ink); }
.token.top { font-weight: 700; text-decoration: underline; } .token.passed { color: #a5adb6; }
.scroll { overflow-x: auto; } #shares { height: 230px; }
@media (max-width: 1000px) { #columns { flex-direction: column; align-items: stretch; }
  aside { position: static; flex: none; } #index-box { max-height: 260px; } }
@media (max-width: 700px) { .plots { grid-template-columns: minmax(0, 1fr); } }
"""

_SCRIPT = r"""
"use strict";
const root = document.documentElement;
addEventListener("error", e => { root.dataset.error = (root.dataset.error || "") + e.message; });
addEventListener("unhandledrejection", e => {
  root.dataset.error = (root.dataset.error || "") + e.reason;
});
const D = JSON.parse(document.getElementById("data").textContent);
const byId = new Map(D.features.map(f => [f.feature, f]));
const $ = id => document.getElementById(id);
const element = (tag, text, name) => {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
};
const visible = piece => {
  const shown = piece.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍");
  return shown.trim() ? shown : shown.replace(/ /g, "␣");
};
// plotly reads its labels as HTML
const label = piece => visible(piece).replace(/&/g, "&amp;").replace(/</g, "&lt;");
const number = (x, digits = 3) => x === null || x === undefined ? "-" : x.toPrecision(digits);
const percent = x => x >= 0.1 ? (100 * x).toFixed(1) + "%" : (100 * x).toPrecision(2) + "%";
const BLUE = "#33658a", ORANGE = "#e07b00", RED = "#cc3311";
const BLOCKS = D.blocks.map(String);

const draw = (id, traces, layout) => Plotly.react(id, traces, {
  margin: {l: 48, r: 12, t: 30, b: 40}, font: {size: 11, color: "#1f2933"}, showlegend: false,
  paper_bgcolor: "#fff", plot_bgcolor: "#fff", ...layout,
}, {displaylogo: false, displayModeBar: false, responsive: true});
const axis = (title, more) =>
  ({title: {text: title, standoff: 6}, gridcolor: "#e8ebee", zerolinecolor: "#c8cdd3", ...more});
const blockAxis = more => axis("block", {type: "category", categoryorder: "array",
  categoryarray: BLOCKS, range: [-0.6, BLOCKS.length - 0.4], ...more});

// --- one feature
const share = f => f.layer_counts.map(n => f.n_fired ? n / f.n_fired : 0);
const meanBlock = f => f.n_fired
  ? share(f).reduce((sum, s, i) => sum + s * D.blocks[i], 0) : null;
const topTokens = f => [...new Set(f.contexts.map(c => D.words[c.tokens[c.at]]))];

function drawHistogram(f) {
  const width = (f.max_activation || 1) / f.histogram.length;
  draw("histogram", [{
    type: "bar", x: f.histogram.map((_, i) => (i + 0.5) * width), y: f.histogram, width,
    marker: {color: ORANGE}, hovertemplate: "activation %{x:.3g}<br>%{y} tokens<extra></extra>",
  }], {title: {text: "Activations above 0"}, bargap: 0,
    xaxis: axis("activation"), yaxis: axis("tokens")});
}

function drawLayers(f) {
  draw("layers", [{
    type: "bar", x: BLOCKS, y: share(f), marker: {color: BLUE}, customdata: f.layer_counts,
    hovertemplate: "block %{x}<br>%{y:.1%} (%{customdata} tokens)<extra></extra>",
  }], {title: {text: "Blocks it fires at"}, xaxis: blockAxis(),
    yaxis: axis("share", {tickformat: ".0%", rangemode: "tozero"})});
}

function drawViolin(f) {
  const traces = f.violin.map((values, i) => {
    const few = values.length < 8;  // too few for a density: the points themselves
    return {
      type: "violin", y: values, x: values.map(() => BLOCKS[i]), name: BLOCKS[i], hoverinfo: "y",
      points: few && "all", pointpos: 0, jitter: 0.3, marker: {size: 4, color: BLUE}, width: 0.85,
      line: {color: BLUE, width: few ? 0 : 1}, meanline: {visible: !few}, spanmode: "hard",
      fillcolor: few ? "rgba(0,0,0,0)" : "rgba(51,101,138,0.25)",
    };
  }).filter(trace => trace.y.length);
  draw("violin", traces, {title: {text: "Activations by block"}, xaxis: blockAxis(),
    yaxis: axis("activation", {rangemode: "tozero"})});
}

function drawContexts(f) {
  $("contexts").replaceChildren(...f.contexts.map(c => {
    const strip = element("div", undefined, "strip");
    strip.append(element("span",
      `${c.acts[c.at].toFixed(2)} · block ${D.blocks[c.layer[c.at]]} · #${c.sequence}`, "place"));
    c.tokens.forEach((word, i) => {
      const piece = D.words[word], passed = c.layer[i] < 0;
      const token = element("span", piece.replace(/[\n\r]/g, "↵"), "token");
      if (passed) token.classList.add("passed");
      if (i === c.at) token.classList.add("top");
      if (c.acts[i] > 0) {
        const alpha = 0.12 + 0.88 * c.acts[i] / f.max_activation;
        token.style.backgroundColor = `rgba(255,150,30,${alpha.toFixed(3)})`;
      }
      token.dataset.act = c.acts[i];
      token.title = visible(piece) + (passed ? "\nspecial token, passed over"
        : `\nactivation ${number(c.acts[i])}\nblock ${D.blocks[c.layer[i]]}, `
          + `route weight ${c.weight[i]}`);
      strip.append(token);
    });
    return strip;
  }));
  if (!f.contexts.length) {
    $("contexts").append(element("p", "Never active on these tokens.", "note"));
  }
}

function show(id) {
  const f = byId.get(id);
  $("selector").value = String(id);
  document.title = `feature ${id}`;
  $("numbers").textContent = `fires on ${percent(f.density)} of the tokens (${f.n_fired}) · `
    + `largest activation ${number(f.max_activation, 4)} · mean block ${number(meanBlock(f))}`
    + (f.score === null ? "" : ` · ${D.score_name} ${f.score}`);
  $("explanation").textContent = f.explanation ? `${f.category}: ${f.explanation}` : "";
  drawHistogram(f); drawLayers(f); drawViolin(f); drawContexts(f);
  for (const row of $("index").tBodies[0].rows) {
    row.classList.toggle("selected", Number(row.dataset.feature) === id);
  }
  root.dataset.feature = id;
}

// --- index
const COLUMNS = [
  ["feature", f => f.feature, f => f.feature],
  ["density", f => f.density, f => percent(f.density)],
  ["mean block", meanBlock, f => f.n_fired ? meanBlock(f).toFixed(1) : "-"],
  ["max", f => f.max_activation, f => number(f.max_activation)],
  [D.score_name, f => f.score, f => number(f.score, 2).replace(/\.0$/, "")],
  ["fires on", f => topTokens(f).join(" "), f => topTokens(f).slice(0, 4).map(visible).join(" ")],
].filter(column => column[0] !== D.score_name || D.features.some(f => f.score !== null));
let sorted = {column: null, sign: 1};

function fillIndex() {
  const wanted = $("search").value.toLowerCase();
  let list = D.features.filter(f =>
    `${f.feature} ${topTokens(f).join(" ")} ${f.category || ""} ${f.explanation || ""}`
      .toLowerCase().includes(wanted));
  if (sorted.column !== null) {
    const key = COLUMNS[sorted.column][1];
    list = [...list].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      return sorted.sign * (x < y ? -1 : x > y ? 1 : 0);
    });
  }
  $("index").tBodies[0].replaceChildren(...list.map(f => {
    const row = element("tr");
    row.dataset.feature = f.feature;
    row.append(...COLUMNS.map(column => element("td", column[2](f))));
    row.onclick = () => go(f.feature);
    row.classList.toggle("selected", String(f.feature) === root.dataset.feature);
    return row;
  }));
}

COLUMNS.forEach((column, i) => {
  const head = element("th", column[0]);
  head.onclick = () => {
    sorted = {column: i, sign: sorted.column === i ? -sorted.sign : i && i < 5 ? -1 : 1};
    for (const cell of head.parentNode.cells) cell.textContent = COLUMNS[cell.cellIndex][0];
    head.textContent += sorted.sign > 0 ? " ▲" : " ▼";
    fillIndex();
  };
  $("index").tHead.rows[0].append(head);
});
$("search").oninput = fillIndex;

// --- texts and shares
function drawText(t) {
  const at = t.tokens.map((_, i) => i), words = t.tokens.map(i => label(D.words[i]));
  const z = D.blocks.map((_, layer) => t.probs.map(p => p[layer]));
  const width = Math.max(500, 110 + 18 * at.length);
  $("heatmap").style.width = width + "px";
  draw("heatmap", [{
    type: "heatmap", x: at, y: BLOCKS, z, zmin: 0,
    colorscale: [[0, "#f4f8fb"], [0.5, "#7fa8c9"], [1, "#12395c"]],
    customdata: z.map(() => words), colorbar: {title: {text: "p"}, thickness: 12},
    hovertemplate: "%{customdata}<br>block %{y}: p = %{z:.3f}<extra></extra>",
  }, {
    type: "scatter", mode: "markers", x: at, y: t.layer.map(layer => BLOCKS[layer]),
    marker: {symbol: "square-open", size: 10, color: RED, line: {width: 2}}, hoverinfo: "skip",
  }], {width, height: 150 + 24 * BLOCKS.length, margin: {l: 48, r: 12, t: 10, b: 90},
    xaxis: {tickvals: at, ticktext: words, tickangle: -60, showgrid: false, zeroline: false,
      range: [-0.5, at.length - 0.5]},
    yaxis: blockAxis({showgrid: false})});
}

function drawShares() {
  draw("shares", [
    {type: "bar", x: BLOCKS, y: D.share, name: "share of tokens", marker: {color: BLUE}},
    {type: "scatter", mode: "lines+markers", x: BLOCKS, y: D.mean_probs,
      name: "mean route probability", line: {color: ORANGE, dash: "dot"}},
  ], {showlegend: true, legend: {orientation: "h", y: 1.15}, xaxis: blockAxis(),
    yaxis: axis("", {tickformat: ".0%", rangemode: "tozero"})});
}

// --- start
function fromHash() {
  const asked = /feature=(\d+)/.exec(location.hash);
  const id = asked && byId.has(Number(asked[1])) ? Number(asked[1]) : D.features[0].feature;
  show(id);
}
function go(id) { location.hash = `feature=${id}`; }
function step(by) {
  const rows = [...$("index").tBodies[0].rows].map(row => Number(row.dataset.feature));
  const at = rows.indexOf(Number($("selector").value));
  if (rows.length) go(rows[(at + by + rows.length) % rows.length]);
}

$("about").textContent = `${D.model} · ${D.architecture}, ${D.routing} routing over blocks `
  + `${BLOCKS.join(", ")} · ${D.d_sae} features, ${D.features.length} on this page · `
  + `${D.n_tokens.toLocaleString("en")} tokens in ${D.n_sequences.toLocaleString("en")} sequences`;
$("selector").append(...D.features.map(f => {
  const option = element("option",
    `${f.feature}   ${topTokens(f).slice(0, 4).map(visible).join(" ")}`);
  option.value = f.feature;
  return option;
}));
$("selector").onchange = () => go($("selector").value);
$("previous").onclick = () => step(-1);
$("next").onclick = () => step(1);
addEventListener("hashchange", fromHash);
fillIndex();
fromHash();
root.dataset.readyMs = Math.round(performance.now());
$("texts").append(...D.texts.map((t, i) => {
  const option = element("option",
    t.tokens.slice(0, 14).map(word => visible(D.words[word])).join("").slice(0, 60));
  option.value = i;
  return option;
}));
$("texts").onchange = () => drawText(D.texts[$("texts").value]);
// after the feature has been painted
setTimeout(() => {
  if (D.texts.length) drawText(D.texts[0]);
  drawShares();
  root.dataset.ready = "yes";
}, 0);
"""


# --- SAEDashboard --------------------------------------------------------------------------------


def plain_sae(sae: RoutedSAE) -> SAE[Any]:
    """The SAE behind the router: the same weights, copied, under the base architecture.

    It is what tools know that ask for an architecture by name; its input is the routed activation.

    Raises:
        ValueError: `sae` is one for training, which may not encode as the saved one does.
    """
    if isinstance(sae, TrainingSAE):
        raise ValueError(
            "a training SAE: save_inference_model(path), then SAE.load_from_disk(path)"
        )
    sae_class, config_class = get_sae_class(sae.cfg.architecture().removeprefix("route_"))
    names = {field.name for field in fields(config_class) if field.init}
    config = config_class(**{name: copy.deepcopy(getattr(sae.cfg, name)) for name in names})
    plain = sae_class(config)
    weights = {k: v.clone() for k, v in sae.state_dict().items() if not k.endswith("_router")}
    plain.load_state_dict(weights)
    return plain.to(device=sae.device, dtype=sae.dtype).eval()


def sae_dashboard_pages(
    model: LanguageModel,
    sae: RoutedSAE,
    tokens: Int[Tensor, "n pos"],
    path: str | Path,
    *,
    features: Sequence[int] | None = None,
    n_features: int = N_FEATURES,
) -> Path:
    """Write SAEDashboard's feature pages as one self-contained file; gives back its path.

    SAEDashboard runs on a copy of the plain SAE behind the router, so `sae` stays as it is, and
    encodes what passes through the routed hook. Special tokens are passed over as in our own page.
    The file needs no network: plotly is in it, and in place of d3 the few of its functions the
    page calls.

    Args:
        model: a HookedTransformer `sae` was trained on, with its tokenizer and nothing attached.
        sae: a RouteSAE for inference.
        tokens: token ids, one sequence per row, at least 12 tokens long.
        path: the HTML file, with this suffix in any case; its folder is made if missing.
        features: which ones; None takes the `n_features` largest maximum activations.
        n_features: how many to take when `features` is None.

    Raises:
        ImportError: SAEDashboard is not installed.
        ValueError: sequences too short, features the SAE does not have or none that is active, or
            a model without an unembedding.
    """
    save_page = _import_sae_dashboard().save_feature_centric_vis
    data = sae_dashboard_data(model, sae, tokens, features=features, n_features=n_features)
    path = Path(path).with_suffix(".html")
    path.parent.mkdir(parents=True, exist_ok=True)
    # the first feature is the strongest: a page that opens on a dead one stays blank
    save_page(data, path, feature_idx=next(iter(data.feature_data_dict)))
    path.write_text(_self_contained(path.read_text()), encoding="utf-8")
    return path


def sae_dashboard_data(
    model: LanguageModel,
    sae: RoutedSAE,
    tokens: Int[Tensor, "n pos"],
    *,
    features: Sequence[int] | None = None,
    n_features: int = N_FEATURES,
) -> Any:
    """SAEDashboard's `SaeVisData` of a RouteSAE; arguments as in `sae_dashboard_pages`.

    Features that are never active on these tokens are left out; the strongest comes first.
    """
    dashboard = _import_sae_dashboard()
    tokenizer = _tokenizer(model)
    if tokens.shape[1] < _MIN_SEQUENCE:
        raise ValueError(
            f"sequences of {tokens.shape[1]} tokens: SAEDashboard needs at least {_MIN_SEQUENCE}"
        )
    if not hasattr(model, "W_U"):
        raise ValueError(
            f"a {type(model).__name__} has no W_U, which SAEDashboard reads the logits from: load "
            "the model with model_class_name='HookedTransformer'"
        )
    _check_features(features, sae.cfg.d_sae)
    passed_over = _passed_over(sae, tokenizer)
    seen = _collect(model, sae, _batches(tokens, 0), passed_over, features)
    chosen = _strongest(seen, n_features if features is None else len(features))
    encoder = plain_sae(sae)
    # SAEDashboard folds the decoder norm into the encoder, which SAELens's TopK refuses and which
    # would rescale the activations of others: they are shown as `sae.encode` gives them
    encoder.fold_W_dec_norm = lambda: None  # type: ignore[method-assign]
    with attach(model, sae) as hook:
        config = dashboard.SaeVisConfig(
            hook_point=hook.name,
            features=chosen,
            device=str(sae.device),
            ignore_tokens=set(passed_over.tolist()),
        )
        return dashboard.SaeVisRunner(config).run(encoder=encoder, model=model, tokens=tokens)


_MIN_SEQUENCE = 12
"""SAEDashboard shows 5 tokens on either side of the activated one, and never less."""


class _SaeDashboard(NamedTuple):
    SaeVisConfig: Any
    SaeVisRunner: Any
    save_feature_centric_vis: Any


def _import_sae_dashboard() -> _SaeDashboard:
    try:
        from sae_dashboard.data_writing_fns import (  # type: ignore[import-not-found]
            save_feature_centric_vis,
        )
        from sae_dashboard.sae_vis_data import SaeVisConfig  # type: ignore[import-not-found]
        from sae_dashboard.sae_vis_runner import SaeVisRunner  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError(
            f"SAEDashboard cannot be imported ({error}): pip install 'sae-lens-route[dashboard]'"
        ) from error
    return _SaeDashboard(SaeVisConfig, SaeVisRunner, save_feature_centric_vis)


def _self_contained(page: str) -> str:
    """SAEDashboard's page with its libraries in it, its encoding named, connections forbidden."""
    for address, script in (
        (r"https://d3js\.org/d3\.v6\.min\.js", _D3_SELECTIONS),
        (r"https://cdn\.plot\.ly/plotly-latest\.min\.js", get_plotlyjs()),
    ):
        tag = rf'<script src="{address}"></script>'
        page, n = re.subn(tag, lambda _, script=script: f"<script>{script}</script>", page)
        if n != 1:
            raise RuntimeError(f"SAEDashboard's page has {n} tags {tag!r} where 1 was expected")
    # a token may be spelled </script>
    page = re.sub(
        r"^ *return \{.*\};$", lambda line: line[0].replace("<", "\\u003c"), page, flags=re.M
    )
    return (
        '<!DOCTYPE html>\n<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        f'img-src data: blob:">\n<title>RouteSAE features</title>\n{page}'
    )


_D3_SELECTIONS = r"""
// what SAEDashboard's page calls of d3 6: selections, with data joined to empty ones
const d3 = (() => {
  const valueOf = (value, node, i, group) =>
    typeof value === "function" ? value.call(node, node.__data__, i, group) : value;
  const inherit = (child, parent) => {
    if (child && "__data__" in parent) child.__data__ = parent.__data__;
    return child;
  };
  class Selection {
    constructor(groups, parents) { this.groups = groups; this.parents = parents; }
    each(act) {
      for (const group of this.groups) {
        group.forEach((node, i) => { if (node) act.call(node, node.__data__, i, group); });
      }
      return this;
    }
    set(value, write) {
      return this.each(function(d, i, group) { write(this, valueOf(value, this, i, group)); });
    }
    node() { return this.groups.flat().find(node => node) || null; }
    empty() { return this.node() === null; }
    select(selector) {
      const one = node => node && inherit(node.querySelector(selector), node);
      return new Selection(this.groups.map(group => group.map(one)), this.parents);
    }
    selectAll(selector) {
      const nodes = this.groups.flat().filter(node => node);
      return new Selection(nodes.map(node => [...node.querySelectorAll(selector)]), nodes);
    }
    append(tag) {
      const one = node => node && node.appendChild(inherit(document.createElement(tag), node));
      return new Selection(this.groups.map(group => group.map(one)), this.parents);
    }
    remove() { return this.each(function() { this.remove(); }); }
    attr(name, value) {
      if (arguments.length < 2) return this.node().getAttribute(name);
      return this.set(value, (node, v) =>
        v === null ? node.removeAttribute(name) : node.setAttribute(name, v));
    }
    style(name, value) {
      return this.set(value, (node, v) =>
        v === null ? node.style.removeProperty(name) : node.style.setProperty(name, v));
    }
    property(name, value) {
      if (arguments.length < 2) return this.node()[name];
      return this.set(value, (node, v) => { node[name] = v; });
    }
    text(value) { return this.set(value, (node, v) => { node.textContent = v ?? ""; }); }
    html(value) { return this.set(value, (node, v) => { node.innerHTML = v ?? ""; }); }
    on(type, act) {
      return this.each(function() {
        this["on" + type] = event => act.call(this, event, this.__data__);
      });
    }
    data(values) {
      const parents = this.parents, groups = this.groups;
      return {enter: () => ({append: tag => new Selection(groups.map((group, i) =>
        [...valueOf(values, parents[i], i, parents)].slice(group.length).map(datum => {
          const child = parents[i].appendChild(document.createElement(tag));
          child.__data__ = datum;
          return child;
        })), parents)})};
    }
  }
  const top = [document.documentElement];
  return {
    select: what => new Selection(
      [[typeof what === "string" ? document.querySelector(what) : what]], top),
    selectAll: selector => new Selection([[...document.querySelectorAll(selector)]], top),
  };
})();
"""
