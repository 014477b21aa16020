"""Every number of an evaluation, token by token in float64, from the definitions alone.

Nothing of the package is called: weights are read as arrays, residual streams come from plain hooks
on the model's blocks, and means are sums over Python lists. The results have the names of the
package's metrics, so that whole records are compared.

Both sides are float64. A sum of a few hundred terms has a relative error of about 1e-13, and a
difference such as `delta_ce` or `regret`, two orders smaller than its terms, of about 1e-11:
`TOLERANCE` leaves two orders more. A wrong formula is off by far more than that.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 1e-9

Edit = Callable[[int, int, int, np.ndarray], np.ndarray | None]
"""(block, row, position, x) -> what the residual stream becomes there; None leaves it."""


class Scene(NamedTuple):
    """A model, an SAE, and text of which some tokens are kept."""

    model: Any
    sae: Any
    blocks: list[int]
    tokens: Tensor
    kept: list[tuple[int, int]]
    """Row and position of every kept token, in order."""
    routes: np.ndarray | None = None
    """Under uniform routing, the route that was drawn for every token."""


class Routed(NamedTuple):
    """One token as its router sees it."""

    probs: list[float]
    route: int
    weight: float
    x_route: np.ndarray


def weights(sae: Any) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy() for name, p in sae.named_parameters()}


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def moments(x: np.ndarray) -> tuple[float, float]:
    """Mean and unbiased standard deviation plus 1e-6."""
    middle = math.fsum(x) / len(x)
    return middle, math.sqrt(math.fsum((x - middle) ** 2) / (len(x) - 1)) + 1e-6


def normalized(x: np.ndarray) -> np.ndarray:
    middle, scale = moments(x)
    return (x - middle) / scale


def encoded(sae: Any, x: np.ndarray) -> np.ndarray:
    """TopK of the pre-activations, negative ones set to 0; b_dec is subtracted from the input."""
    w = weights(sae)
    pre = (x - w["b_dec"] * sae.cfg.apply_b_dec_to_input) @ w["W_enc"] + w["b_enc"]
    acts = np.zeros_like(pre)
    for feature in sorted(range(len(pre)), key=lambda f: -pre[f])[: sae.cfg.k]:
        acts[feature] = max(pre[feature], 0.0)
    return acts


def decoded(sae: Any, acts: np.ndarray) -> np.ndarray:
    w = weights(sae)
    return acts @ w["W_dec"] + w["b_dec"]


def rebuilt(sae: Any, x: np.ndarray) -> np.ndarray:
    return decoded(sae, encoded(sae, x))


def relative_error(found: np.ndarray, target: np.ndarray) -> float:
    return math.fsum((found - target) ** 2) / math.fsum(target**2)


def routed(sae: Any, streams: list[np.ndarray], drawn: int | None) -> Routed:
    """Equations 5 to 9 and 14 for one token; `drawn` is its route under uniform routing."""
    n = [normalized(x) for x in streams]
    if sae.cfg.routing == "uniform":
        assert drawn is not None
        shares = sae.cfg.route_shares or [1 / len(n)] * len(n)
        return Routed(shares, drawn, 1.0, n[drawn])
    pooled = sum(n) / (len(n) if sae.cfg.aggregation == "mean" else 1)
    logits = [math.fsum(pooled * column) for column in weights(sae)["W_router"].T]
    total = math.fsum(math.exp(a - max(logits)) for a in logits)
    probs = [math.exp(a - max(logits)) / total for a in logits]
    route = max(range(len(probs)), key=lambda i: probs[i])
    if sae.cfg.routing == "soft":
        mixture = sum(p * x for p, x in zip(probs, n, strict=True))
        return Routed(probs, route, probs[route], mixture)
    return Routed(probs, route, probs[route], probs[route] * n[route])


# --- the model ------------------------------------------------------------------------------------


def run(model: Any, tokens: Tensor, edit: Edit | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Log probabilities, and the residual stream after every block, edits included."""
    streams: dict[int, np.ndarray] = {}

    def after(block: int) -> Callable[..., Tensor]:
        def hook(_module: Any, _args: Any, output: Tensor) -> Tensor:
            x = output.detach().clone()
            for row, position in np.ndindex(*tokens.shape):
                new = None
                if edit is not None:
                    new = edit(block, row, position, x[row, position].numpy().copy())
                if new is not None:
                    x[row, position] = torch.from_numpy(new)
            streams[block] = x.numpy().copy()
            return x

        return hook

    handles = [block.register_forward_hook(after(i)) for i, block in enumerate(model.blocks)]
    try:
        with torch.no_grad():
            logits = model(tokens).double().numpy()
    finally:
        for handle in handles:
            handle.remove()
    largest = logits.max(-1, keepdims=True)
    log_total = np.log(np.exp(logits - largest).sum(-1, keepdims=True))
    return logits - largest - log_total, np.stack([streams[i] for i in sorted(streams)])


def routings(scene: Scene, streams: np.ndarray) -> dict[tuple[int, int], Routed]:
    """The routing of every kept token, from the streams after all blocks."""
    return {
        (row, position): routed(
            scene.sae,
            [streams[block, row, position] for block in scene.blocks],
            None if scene.routes is None else int(scene.routes[row, position]),
        )
        for row, position in scene.kept
    }


# --- reconstruction -------------------------------------------------------------------------------


def explained_variance(inputs: list[np.ndarray], outputs: list[np.ndarray]) -> float:
    middle = sum(inputs) / len(inputs)
    error = math.fsum(math.fsum((x - y) ** 2) for x, y in zip(inputs, outputs, strict=True))
    return 1 - error / math.fsum(math.fsum((x - middle) ** 2) for x in inputs)


def n_silent(features: list[np.ndarray]) -> int:
    """Features that are 0 on every token."""
    return sum(not any(values) for values in zip(*features, strict=True))


def n_dense(features: list[np.ndarray]) -> int:
    """Features that are not 0 on more than a tenth of the tokens."""
    counts = [sum(value != 0 for value in values) for values in zip(*features, strict=True)]
    return sum(10 * count > len(features) for count in counts)


def reconstruction(scene: Scene) -> dict[str, Any]:
    """The fields of `ReconstructionMetrics`."""
    sae, blocks = scene.sae, scene.blocks
    _, streams = run(scene.model, scene.tokens)
    at = list(routings(scene, streams).values())
    features = [encoded(sae, r.x_route) for r in at]
    outputs = [decoded(sae, acts) for acts in features]
    errors = [relative_error(y, r.x_route) for y, r in zip(outputs, at, strict=True)]
    table = []
    for (row, position), r in list(zip(scene.kept, at, strict=True))[::4]:  # one token in four
        targets = [r.weight * normalized(streams[block, row, position]) for block in blocks]
        table.append([relative_error(rebuilt(sae, target), target) for target in targets])
    n, routes = len(at), [r.route for r in at]
    shares = [routes.count(i) / n for i in range(len(blocks))]
    fixed = [mean([line[i] for line in table]) for i in range(len(blocks))]
    by_block = [
        [e for e, route in zip(errors, routes, strict=True) if route == i]
        for i in range(len(blocks))
    ]
    best = mean([min(line) for line in table])
    two_largest = [sorted(r.probs)[::-1][:2] for r in at]
    return {
        "n_tokens": n,
        "norm_mse": mean(errors),
        "explained_variance": explained_variance([r.x_route for r in at], outputs),
        "l0": mean([float(sum(acts != 0)) for acts in features]),
        "dead_features": n_silent(features),
        "dense_features": n_dense(features),
        "share_by_block": dict(zip(blocks, shares, strict=True)),
        "mean_probs_by_block": {b: mean([r.probs[i] for r in at]) for i, b in enumerate(blocks)},
        "load_entropy": -math.fsum(s * math.log(s) for s in shares if s > 0),
        "route_weight": mean([r.weight for r in at]),
        "margin": mean([two[0] - two[-1] for two in two_largest]),
        "norm_mse_by_block": {
            b: mean(own) if own else None for b, own in zip(blocks, by_block, strict=True)
        },
        "norm_mse_fixed_block": dict(zip(blocks, fixed, strict=True)),
        "norm_mse_uniform": mean(fixed),
        "norm_mse_matched": math.fsum(s * f for s, f in zip(shares, fixed, strict=True)),
        "norm_mse_best": best,
        "regret": None if sae.cfg.routing == "soft" else mean(errors[::4]) - best,
    }


def crosscoder_reconstruction(scene: Scene) -> dict[str, Any]:
    """The fields of `CrosscoderMetrics`."""
    _, streams = run(scene.model, scene.tokens)
    inputs = [_concatenated(scene, streams, row, position) for row, position in scene.kept]
    features = [encoded(scene.sae, h) for h in inputs]
    outputs = [decoded(scene.sae, acts) for acts in features]
    width = streams.shape[-1]
    by_block = {}
    for i, block in enumerate(scene.blocks):
        part = slice(i * width, (i + 1) * width)
        pairs = zip(outputs, inputs, strict=True)
        by_block[block] = mean([relative_error(y[part], x[part]) for y, x in pairs])
    return {
        "n_tokens": len(inputs),
        "norm_mse": mean(list(by_block.values())),
        "explained_variance": explained_variance(inputs, outputs),
        "l0": mean([float(sum(acts != 0)) for acts in features]),
        "dead_features": n_silent(features),
        "dense_features": n_dense(features),
        "norm_mse_by_block": by_block,
    }


def _concatenated(scene: Scene, streams: np.ndarray, row: int, position: int) -> np.ndarray:
    return np.concatenate([normalized(streams[b, row, position]) for b in scene.blocks])


# --- downstream -----------------------------------------------------------------------------------


def splice_edit(scene: Scene, at: dict[tuple[int, int], Routed], unscaled: bool) -> Edit:
    """Each kept token is rewritten at its own block, with p on both sides of the SAE or on none."""

    def edit(block: int, row: int, position: int, x: np.ndarray) -> np.ndarray | None:
        r = at.get((row, position))
        if r is None or scene.blocks[r.route] != block:
            return None
        middle, scale = moments(x)
        p = 1.0 if unscaled else r.weight
        return rebuilt(scene.sae, p * (x - middle) / scale) / p * scale + middle

    return edit


def zero_edit(scene: Scene, at: dict[tuple[int, int], Routed]) -> Edit:
    """Each kept token's stream is zero after its own block."""

    def edit(block: int, row: int, position: int, x: np.ndarray) -> np.ndarray | None:
        r = at.get((row, position))
        return None if r is None or scene.blocks[r.route] != block else 0 * x

    return edit


def downstream(scene: Scene, unscaled: bool = False) -> dict[str, Any]:
    """The fields of `DownstreamMetrics` of a RouteSAE."""
    clean, streams = run(scene.model, scene.tokens)
    at = routings(scene, streams)
    spliced, after = run(scene.model, scene.tokens, splice_edit(scene, at, unscaled))
    ablated, _ = run(scene.model, scene.tokens, zero_edit(scene, at))
    again = routings(scene, after)
    kl = kl_of(scene, clean, spliced)
    by_block = {
        block: [kl[token] for token in scene.kept if at[token].route == i]
        for i, block in enumerate(scene.blocks)
    }
    return {
        **_predictions(scene, clean, spliced, ablated),
        "kl_by_block": {block: mean(own) if own else None for block, own in by_block.items()},
        "route_agreement": mean([float(again[t].route == at[t].route) for t in scene.kept]),
    }


def crosscoder_downstream(scene: Scene) -> dict[str, Any]:
    """The same of a crosscoder, which writes every kept token at every block."""
    clean, streams = run(scene.model, scene.tokens)
    width = streams.shape[-1]

    def edit(block: int, row: int, position: int, x: np.ndarray) -> np.ndarray | None:
        if block not in scene.blocks or (row, position) not in scene.kept:
            return None
        i = scene.blocks.index(block)
        h = rebuilt(scene.sae, _concatenated(scene, streams, row, position))
        middle, scale = moments(streams[block, row, position])
        return h[i * width : (i + 1) * width] * scale + middle

    def zero(block: int, row: int, position: int, x: np.ndarray) -> np.ndarray | None:
        return 0 * x if block in scene.blocks and (row, position) in scene.kept else None

    spliced, _ = run(scene.model, scene.tokens, edit)
    ablated, _ = run(scene.model, scene.tokens, zero)
    kl = mean(list(kl_of(scene, clean, spliced).values()))
    return {
        **_predictions(scene, clean, spliced, ablated),
        "kl_by_block": dict.fromkeys(scene.blocks, kl),
        "route_agreement": None,
    }


def kl_of(scene: Scene, clean: np.ndarray, other: np.ndarray) -> dict[tuple[int, int], float]:
    """KL(clean || other) in nats at every kept token."""
    return {
        token: math.fsum(np.exp(clean[token]) * (clean[token] - other[token]))
        for token in scene.kept
    }


def cross_entropy(scene: Scene, log_probs: np.ndarray) -> float:
    """Mean loss in nats over the kept tokens that have a token before them."""
    tokens = scene.tokens.numpy()
    return mean([-log_probs[row, at - 1, tokens[row, at]] for row, at in scene.kept if at > 0])


def _predictions(
    scene: Scene, clean: np.ndarray, spliced: np.ndarray, ablated: np.ndarray
) -> dict[str, Any]:
    kl = mean(list(kl_of(scene, clean, spliced).values()))
    ce_clean, ce_spliced, ce_ablated = (
        cross_entropy(scene, each) for each in (clean, spliced, ablated)
    )
    recovered = (ce_ablated - ce_spliced) / (ce_ablated - ce_clean)
    return {
        "n_tokens": len(scene.kept),
        "kl": kl,
        "kl_per_512_tokens": 512 * kl,
        "kl_ablated": mean(list(kl_of(scene, clean, ablated).values())),
        "ce_clean": ce_clean,
        "ce_spliced": ce_spliced,
        "ce_ablated": ce_ablated,
        "delta_ce": ce_spliced - ce_clean,
        "loss_recovered": recovered if ce_ablated - ce_clean >= 0.05 else None,
    }
