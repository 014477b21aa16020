"""The router as a mixin for SAELens SAEs.

`RoutedSAEMixin` and `RoutedTrainingSAEMixin` add the router to a SAELens class and change nothing
else of it: `encode` and `decode` take the routed activation `[..., d]`, which is what SAELens's
tools find at the routed hook.

Training takes batches `[tokens, L, d]` in SAELens's own `SAETrainer`: the mixin routes them and
passes the routed activation to the base class's `training_forward_pass`. What the paper adds to
that pass enters through the base class's own seams: the loss through `mse_loss_fn`, the units of
the penalties through `calculate_aux_loss`, the decoder norm through the step counter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens.saes.sae import SAE, TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_route.errors import UserError
from sae_lens_route.saes.assignment import COMPARED, assignment_loss
from sae_lens_route.saes.decoder_bias import initialize_b_dec
from sae_lens_route.saes.loss import divisor, mse, norm_mse, normalized_mse
from sae_lens_route.saes.metadata import route_names
from sae_lens_route.saes.reconstruct import reconstruct
from sae_lens_route.saes.router import Routing, draw_routes, normalize, root, route
from sae_lens_route.saes.streams import (
    StreamsSAEMixin,
    StreamsTrainingSAEMixin,
    without_unused_mask,
)

_GIVEN_ROUTES: ContextVar[Mapping[int, Int[Tensor, ...]]] = ContextVar("given routes")
"""Routes of `with_routes` by the SAE's id; a context variable: threads do not share it."""


class RoutedSAEMixin(StreamsSAEMixin):
    """Adds `W_router [d, L]` and `route` to a SAELens SAE; precedes it among the bases."""

    W_router: nn.Parameter
    q_router: nn.Parameter
    cfg: Any
    _generator: torch.Generator | None = None
    _shares: Float[Tensor, " L"] | None = None

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        cfg = self.cfg
        like = {"dtype": self.dtype, "device": self.device}
        # the reference's nn.Linear(d, L): uniform within 1/sqrt(d)
        router = torch.empty(cfg.d_in, cfg.n_routed_layers, **like)
        self.W_router = nn.Parameter(nn.init.uniform_(router, -(cfg.d_in**-0.5), cfg.d_in**-0.5))
        if cfg.aggregation == "attention":
            self.q_router = nn.Parameter(torch.zeros(cfg.d_in, **like))

    def route(self, x: Float[Tensor, "... L d"]) -> Routing:
        """Route residual streams, one per routed block and in order (Eq. 5-9, 14).

        Raises:
            UserError: the last two axes are not `[n_routed_layers, d_in]`.
        """
        expected = (self.cfg.n_routed_layers, self.cfg.d_in)
        if tuple(x.shape[-2:]) != expected:
            raise UserError(
                f"route takes [..., n_routed_layers, d_in] = [..., {expected[0]}, {expected[1]}], "
                f"got {list(x.shape)}"
            )
        given = None
        if self.cfg.routing == "uniform":  # elsewhere torch.compile makes one graph of this method
            given = _GIVEN_ROUTES.get({}).get(id(self))
        if given is not None and given.shape != x.shape[:-2]:
            raise UserError(
                f"with_routes was given routes of shape {list(given.shape)} for "
                f"tokens of shape {list(x.shape[:-2])}"
            )
        return route(
            x.to(self.dtype),
            self.W_router,
            routing=self.cfg.routing,
            aggregation=self.cfg.aggregation,
            scale_by_probability=self.cfg.scale_by_probability,
            q_router=self.q_router if self.cfg.aggregation == "attention" else None,
            route_shares=self._route_shares(x.device),
            generator=self._uniform_generator(x.device),
            drawn=given,
        )

    def encode_layers(self, x: Float[Tensor, "... L d"]) -> Float[Tensor, "... d_sae"]:
        """Feature activations of residual streams: route, then encode."""
        return self.encode(self.route(x).x_route)

    def route_errors(self, x: Float[Tensor, "... L d"], routing: Routing) -> Float[Tensor, "... L"]:
        """NormMSE of every token at every route, each with the weight of the route it was sent to.

        One weight for all routes, because the dictionary is trained on routed activations: at
        the small probability of another route the biases alone would decide the error.
        """
        weight = routing.weight.unsqueeze(-1)
        errors = []
        for x_i in x.to(routing.x_route.dtype).unbind(-2):
            target = weight * normalize(x_i)
            errors.append(norm_mse(reconstruct(self, target), target))
        return torch.stack(errors, dim=-1)

    def _uniform_generator(self, device: torch.device) -> torch.Generator | None:
        if self._generator is None or self._generator.device != device:
            self._generator = self._new_generator(device)
        return self._generator

    def _new_generator(self, device: torch.device) -> torch.Generator | None:
        if self.cfg.routing != "uniform" or device.type == "meta":  # meta tensors have no values
            return None
        return torch.Generator(device).manual_seed(self.cfg.routing_seed)

    def _route_shares(self, device: torch.device) -> Float[Tensor, " L"] | None:
        if self.cfg.route_shares is None:
            return None
        if self._shares is None or self._shares.device != device:  # a copy to a GPU stalls the host
            shares = self.cfg.route_shares
            self._shares = torch.tensor(shares, dtype=torch.float32, device=device)
        return self._shares

    def __getstate__(self) -> dict[str, Any]:
        # a generator can be neither copied nor pickled; a copy draws from the seed again
        return {**self.__dict__, "_generator": None}

    @override
    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """Does nothing where the decoder rows have unit norm, as in every saved RouteSAE."""
        norms = self.W_dec.norm(dim=-1)
        if not torch.allclose(norms, torch.ones_like(norms), atol=1e-4):
            super().fold_W_dec_norm()


class RoutedTrainingSAEMixin(RoutedSAEMixin, StreamsTrainingSAEMixin):
    """Adds routing to a SAELens training SAE; `sae_in` of a step is `[tokens, L, d]`."""

    def __init__(self, cfg: Any, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.mse_loss_fn = normalized_mse if cfg.loss == "normalized_mse" else mse
        frozen = {"W_router", "q_router"} if cfg.router_objective == "frozen" else set()
        if not cfg.latent_bias:
            frozen.add("b_enc")
        for name, parameter in self.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        if self.cfg.decoder_init_norm is None:
            # SAELens draws within sqrt(6/d), the reference's nn.Linear within 1/sqrt(d)
            self.W_enc.data.mul_(6**-0.5)
            self.W_dec.data.mul_(6**-0.5)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step on residual streams; the output's `sae_in` is the routed activation.

        `metrics` gains `route_share/block_N` (share of the tokens sent to block N), `route_weight`
        (mean probability of the chosen route) and `route_entropy` (nats, of the mean p); all are
        computed only when read.
        """
        step_input = self.begin_step(step_input)
        x = step_input.sae_in
        routing = self.route(x)
        if step_input.n_training_steps == 0:
            initialize_b_dec(self.b_dec, self.cfg.b_dec_init, routing.x_route)
        learns_assignment = self.cfg.router_objective == "assignment"
        x_route = routing.x_route.detach() if learns_assignment else routing.x_route
        output = super().training_forward_pass(replace(step_input, sae_in=x_route))
        if learns_assignment:
            loss = self._assignment_loss(x, routing)
            output.losses["assignment_loss"] = loss
            output.loss = output.loss + loss
        output.metrics.update(_route_metrics(routing, route_names(self)))
        return output

    def begin_step(self, step_input: TrainStepInput) -> TrainStepInput:
        """Normalize the decoder if it is due; returns the input for SAELens's forward pass."""
        if self._decoder_norm_is_due(step_input.n_training_steps):
            self.normalize_decoder()
        return without_unused_mask(step_input, self.cfg)

    def _assignment_loss(
        self, x: Float[Tensor, "tokens L d"], routing: Routing
    ) -> Float[Tensor, ""]:
        compared = routing.of(slice(None, None, COMPARED))
        with torch.no_grad():
            errors = self.route_errors(x[::COMPARED], compared)
        return assignment_loss(errors, compared.probs)

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """The architecture's penalties, in units that suit the loss.

        With the normalized loss an L1 norm is taken relative to the mean norm of x_route, a squared
        error relative to its mean squared norm. In SAELens's own units both would reward the router
        for shrinking p, and dominate a loss that lies between 0 and 1.
        """
        losses = super().calculate_aux_loss(  # type: ignore[safe-super]
            step_input, feature_acts, hidden_pre, sae_out
        )
        assert isinstance(losses, dict)  # as from all of SAELens's own classes
        if self.cfg.loss == "mse":
            return losses
        squared_norm = step_input.sae_in.pow(2).sum(dim=-1)
        units = {
            "l1_loss": lambda: divisor(root(squared_norm).mean()),
            "auxiliary_reconstruction_loss": lambda: divisor(squared_norm.mean()),
        }

        def off(loss: Tensor) -> bool:
            """Whether the loss is a constant, which only shows while gradients are taken."""
            return torch.is_grad_enabled() and not loss.requires_grad

        return {
            name: loss if name not in units or off(loss) else loss / units[name]()
            for name, loss in losses.items()
        }

    def _decoder_norm_is_due(self, step: int) -> bool:
        """True before the first step, and at the beginning of the step after 0, N, 2N, ..."""
        interval = self.cfg.decoder_norm_interval
        return interval > 0 and (step == 0 or (step - 1) % interval == 0)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Set every decoder row to unit norm, in place."""
        self.W_dec.data.copy_(unit_rows(self.W_dec.data))

    @override
    def save_inference_model(self, path: Any) -> Any:
        if self.cfg.decoder_norm_interval > 0:
            self.normalize_decoder()
        return super().save_inference_model(path)


def uniform_draws(sae: SAE[Any]) -> Callable[[torch.Size], Int[Tensor, ...] | None]:
    """A function from the shape of a batch of tokens to their routes, drawn from the seed on.

    Uniform routing draws again whenever `route` is called. Code that reads the same tokens several
    times and compares the results, as an evaluation does, draws once per batch with this function
    and repeats the draw with `with_routes`. The function returns None for every SAE that does not
    draw: hard or soft routing, a crosscoder.
    """
    if not isinstance(sae, RoutedSAEMixin) or sae.cfg.routing != "uniform":
        return lambda shape: None
    device = sae.W_router.device
    generator, shares = sae._new_generator(device), sae._route_shares(device)
    return lambda shape: draw_routes(shape, sae.cfg.n_routed_layers, shares, generator, device)


@contextmanager
def with_routes(sae: SAE[Any], routes: Int[Tensor, ...] | None) -> Iterator[None]:
    """Within the block, uniform routing takes these routes instead of drawing.

    Args:
        sae: Any SAE; only a RouteSAE with uniform routing is affected.
        routes: One per token that `route` is called with; None draws as always.
    """
    if routes is None or not isinstance(sae, RoutedSAEMixin):
        yield
        return
    token = _GIVEN_ROUTES.set({**_GIVEN_ROUTES.get({}), id(sae): routes})
    try:
        yield
    finally:
        _GIVEN_ROUTES.reset(token)


@contextmanager
def uniform_from_the_seed(sae: SAE[Any]) -> Iterator[None]:
    """Within the block, uniform routing draws from its seed on; afterwards it draws as before."""
    if not isinstance(sae, RoutedSAEMixin):
        yield
        return
    before, sae._generator = sae._generator, None
    try:
        yield
    finally:
        sae._generator = before


def unit_rows(W_dec: Float[Tensor, "d_sae d"]) -> Float[Tensor, "d_sae d"]:
    """Rows scaled to unit norm; idempotent, as rows that have it to rounding stay bit-identical."""
    norm = W_dec.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    return W_dec / torch.where((norm - 1).abs() < 1e-6, 1.0, norm)


def _route_metrics(routing: Routing, names: list[str]) -> dict[str, Any]:
    """Route statistics as callables, so that a step that is not logged pays nothing for them."""
    chosen, probs, weight = routing.route, routing.probs.detach(), routing.weight.detach()

    def share(route: int) -> Tensor:
        return (chosen == route).float().mean()

    def entropy() -> Tensor:
        mean_probs = probs.flatten(0, -2).mean(0)
        return torch.special.entr(mean_probs).sum()

    return {
        **{f"route_share/{name}": (lambda i=i: share(i)) for i, name in enumerate(names)},
        "route_weight": lambda: weight.mean(),
        "route_entropy": entropy,
    }
