"""What goes wrong in a run without an exception: bad steps, a collapsed router, dead features."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import logger
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from sae_lens_route.errors import UserError

BLOCK_SHARE = "route_share/block_"
COLLAPSED = 0.9
"""Share of the tokens above which one block has them all."""
DEAD = 0.5
"""Share of dead features that is worth a warning."""
_WINDOW = 10
"""Records over which a block's share is averaged."""


class BadStepError(UserError):
    """A loss or an update that is not finite, found in a run with `on_bad_step="stop"`."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class BadSteps:
    """Steps whose loss or weights are not finite, counted on the device: no step waits for it.

    Args:
        trainer: Its SAE is watched. Everything a step changes is put back after a bad one if
            `skips`, from copies on the device.
        skips: Whether bad steps are undone.
    """

    def __init__(self, trainer: SAETrainer[Any, Any], skips: bool) -> None:
        self._trainer, self.skips = trainer, skips
        device = trainer.act_freq_scores.device
        self._first: Int[Tensor, ""] = torch.tensor(-1, device=device)
        self._count: Int[Tensor, ""] = torch.tensor(0, device=device)
        self._before: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Called before a step."""
        if self.skips:
            self._before = {name: value.clone() for name, value in self._changed_by_a_step()}

    @torch.no_grad()
    def end(self, loss: Float[Tensor, ""], step: int) -> None:
        """Called after a step with its number, counted from 1."""
        bad = self._is_bad(loss)
        self._first = torch.where(bad & (self._first < 0), step, self._first)
        self._count += bad
        if self.skips:
            for name, value in self._changed_by_a_step():
                before = self._before.get(name)  # Adam's moments exist after the first step
                value.copy_(torch.where(bad, 0 if before is None else before, value))

    def first(self) -> int | None:
        """Number of the first bad step, or None. Waits for the device."""
        first = int(self._first)
        return None if first < 0 else first

    def count(self) -> int:
        """How many bad steps there were. Waits for the device."""
        return int(self._count)

    def _is_bad(self, loss: Float[Tensor, ""]) -> Bool[Tensor, ""]:
        # a sum is NaN or inf as soon as one term is, and needs no temporary tensor
        sums = [value.sum(dtype=torch.float32) for value in self._weights()]
        return ~torch.isfinite(torch.stack([loss.detach().float(), *sums]).sum())

    def _weights(self) -> Iterator[Tensor]:
        sae = self._trainer.sae
        yield from (parameter.detach() for parameter in sae.parameters())
        yield from (buffer for buffer in sae.buffers() if buffer.is_floating_point())

    def _changed_by_a_step(self) -> Iterator[tuple[str, Tensor]]:
        trainer = self._trainer
        yield "act_freq_scores", trainer.act_freq_scores
        yield "n_forward_passes_since_fired", trainer.n_forward_passes_since_fired
        for name, buffer in trainer.sae.named_buffers():
            yield name, buffer
        for name, parameter in trainer.sae.named_parameters():
            yield name, parameter.detach()
            state = trainer.optimizer.state.get(parameter, {})
            for key in ("exp_avg", "exp_avg_sq"):
                if key in state:
                    yield f"{name}.{key}", state[key]


class Watch:
    """Warns once of a router that collapsed and of dead features, from the records of the log.

    Args:
        trainer: Whose records it sees.
        entry: Name of the entry of a sweep, or empty.
    """

    def __init__(self, trainer: SAETrainer[Any, Any], entry: str = "") -> None:
        self._sae, self._window = trainer.sae, trainer.cfg.dead_feature_window
        self._prefix = f"entry {entry!r}: " if entry else ""
        self._shares: deque[tuple[int, dict[str, float]]] = deque(maxlen=_WINDOW)
        self._learns_routes = getattr(trainer.sae.cfg, "routing", "uniform") != "uniform"
        self._warned_of_routes = self._warned_of_dead = False

    def see(self, record: Mapping[str, Any]) -> None:
        """Look at one record."""
        if self._learns_routes and not self._warned_of_routes:
            self._see_routes(record)
        if not self._warned_of_dead:
            self._see_dead(record)

    def _see_routes(self, record: Mapping[str, Any]) -> None:
        shares = {k.removeprefix(BLOCK_SHARE): v for k, v in record.items() if BLOCK_SHARE in k}
        self._shares.append((record["step"], shares))
        if len(self._shares) < _WINDOW or len(shares) < 2:
            return
        mean = {block: sum(each[block] for _, each in self._shares) / _WINDOW for block in shares}
        block, share = max(mean.items(), key=lambda item: item[1])
        if share > COLLAPSED:
            self._warned_of_routes = True
            logger.warning(
                f"{self._prefix}the router collapsed: block {block} received {share:.0%} of the "
                f"tokens of {_WINDOW} records (steps {self._shares[0][0]} to {record['step']}); "
                "router_objective='assignment' balances the blocks, routing='uniform' draws them, "
                f"routed_blocks without block {block} leaves the choice among the others"
            )

    def _see_dead(self, record: Mapping[str, Any]) -> None:
        n_dead, d_sae = record["dead_features"], self._sae.cfg.d_sae
        if n_dead > DEAD * d_sae:
            self._warned_of_dead = True
            logger.warning(
                f"{self._prefix}{n_dead:,} of {d_sae:,} features ({n_dead / d_sae:.0%}) have not "
                f"fired for more than dead_feature_window={self._window} steps (step "
                f"{record['step']}): lower d_sae or lr, or allow more active features (k, a lower "
                "sparsity coefficient)"
            )
