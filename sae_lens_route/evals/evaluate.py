"""Everything that is measured of SAEs on a text, read once for all of them.

A token that an SAE excludes (`metadata.exclude_special_tokens`, `metadata.seqpos_slice`) is neither
spliced nor counted.

Under uniform routing the routes of a batch are drawn once, from `routing_seed` on, for everything
that is measured of it. So the reconstruction and both splices belong to the same routes, and an
evaluation that is repeated returns the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from sae_lens import SAE
from sae_lens.config import HfDataset
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler

from sae_lens_route.data.activations import RoutedActivationsStore
from sae_lens_route.data.reading import ActivationBatch, Text, activation_batches
from sae_lens_route.errors import UserError
from sae_lens_route.evals.downstream import DownstreamMetrics, DownstreamSums
from sae_lens_route.evals.predictions import CleanPass
from sae_lens_route.evals.reconstruction import (
    CrosscoderMetrics,
    CrosscoderSums,
    ReconstructionMetrics,
    ReconstructionSums,
)
from sae_lens_route.models.kinds import LanguageModel
from sae_lens_route.records import plain, typed
from sae_lens_route.saes.crosscoder import CrosscoderSAEMixin
from sae_lens_route.saes.kinds import is_crosscoder, is_soft
from sae_lens_route.saes.routed import RoutedSAEMixin, uniform_draws, with_routes
from sae_lens_route.splice import attach


class ContextMeans(NamedTuple):
    """Means over the kept tokens of each context, in the order they were read.

    Over them, and over seeds, an interval says how far a mean depends on the text.
    """

    n_tokens: list[int]
    norm_mse: list[float]
    kl: list[float] | None
    """Null where there is no splice."""


class Evaluation(NamedTuple):
    """Everything measured of one RouteSAE or crosscoder on one text."""

    reconstruction: ReconstructionMetrics | CrosscoderMetrics
    """In normalized units, from activations alone."""
    downstream: DownstreamMetrics | None
    """The model with the SAE spliced in; null under soft routing."""
    downstream_unscaled: DownstreamMetrics | None
    """The same without p on either side of the SAE: the convention of the paper's code. Null under
    soft routing, for a crosscoder, and when not requested."""
    by_context: ContextMeans | None = None
    """NormMSE and KL of each context; null in results that predate this field."""

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries, for JSON."""
        return plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """The evaluation that `to_dict` or its JSON describes."""
        return typed(cls, values)


def evaluate(
    model: LanguageModel,
    sae: SAE[Any],
    text: Text,
    *,
    max_tokens: int = 50_000,
    batch_size: int = 8,
) -> Evaluation:
    """Evaluate a RouteSAE or a crosscoder on the first `max_tokens` of a text.

    Args:
        model: The model `sae` was trained on.
        sae: A RouteSAE or a crosscoder with its metadata.
        text: The text to read.
        max_tokens: Tokens to read, excluded ones included.
        batch_size: Contexts in one forward pass.

    Raises:
        UserError: there were no tokens, or `sae` is of another kind.
    """
    return evaluate_all(
        model, {"": sae}, text, max_tokens=max_tokens, batch_size=batch_size, unscaled=True
    )[""]


@torch.no_grad()
def evaluate_all(
    model: LanguageModel,
    saes: Mapping[str, SAE[Any]],
    text: Text,
    *,
    max_tokens: int = 50_000,
    batch_size: int = 8,
    splice: bool = True,
    unscaled: bool = False,
) -> dict[str, Evaluation]:
    """Evaluate many SAEs of one model on the same text, read once, with one clean pass for all.

    Args:
        model: The model the SAEs were trained on.
        saes: RouteSAEs and crosscoders by name. All must read text in the same way.
        text: The text to read.
        max_tokens: Tokens to read, excluded ones included.
        batch_size: Contexts in one forward pass.
        splice: Whether the model is run with each SAE in it; without, only the metrics of
            activations are measured.
        unscaled: Also splice without p, as the paper's code does.

    Raises:
        UserError: there were no tokens, two SAEs read text differently, or one is of another kind.
    """
    conventions = ((False, True) if unscaled else (False,)) if splice else ()
    sums = {name: _EvaluationSums(model, sae, conventions) for name, sae in saes.items()}
    needs_clean = any(each.downstream for each in sums.values())
    size = {"max_tokens": max_tokens, "batch_size": batch_size}
    for batch in activation_batches(
        model, list(saes.values()), text, **size, description="evaluating"
    ):
        clean = CleanPass(model, batch.tokens) if needs_clean else None
        for each in sums.values():
            each.add(batch, clean)
    return {name: each.evaluation() for name, each in sums.items()}


class _EvaluationSums:
    """Running sums of all metrics of one SAE.

    Args:
        model: The model it was trained on.
        sae: A RouteSAE or a crosscoder.
        conventions: Of the splices to measure: False with p, True without.
    """

    def __init__(self, model: LanguageModel, sae: SAE[Any], conventions: Iterable[bool]) -> None:
        if is_crosscoder(sae):
            self.sae, self.reconstruction = sae, CrosscoderSums(sae)
        elif isinstance(sae, RoutedSAEMixin):
            self.sae, self.reconstruction = sae, ReconstructionSums(sae)
        else:
            raise UserError(
                f"a {type(sae).__name__} is neither a RouteSAE nor a crosscoder; evaluate it with "
                "SAELens's run_evals"
            )
        self.draws = uniform_draws(sae)
        self.downstream = {
            convention: DownstreamSums(model, self.sae, convention)
            for convention in conventions
            if not is_soft(sae) and not (convention and is_crosscoder(sae))
        }
        self.by_context: dict[str, list[torch.Tensor]] = {"tokens": [], "norm_mse": [], "kl": []}

    def add(self, batch: ActivationBatch, clean: CleanPass | None) -> None:
        streams = batch.of(self.sae)
        kept = batch.kept.to(streams.device)
        routes = self.draws(batch.tokens.shape)
        with with_routes(self.sae, None if routes is None else routes[kept]):
            error = self.reconstruction.add(streams[kept])
        in_place = torch.zeros(kept.shape, dtype=torch.float64, device=kept.device)
        in_place[kept] = error.double()
        self.by_context["tokens"].append(kept.sum(1))
        self.by_context["norm_mse"].append(in_place.sum(1))
        with with_routes(self.sae, routes):
            for convention, sums in self.downstream.items():
                assert clean is not None
                kl = sums.add(streams, batch.kept, clean)
                if not convention:
                    self.by_context["kl"].append(kl.sum(1))

    def evaluation(self) -> Evaluation:
        scaled, unscaled = self.downstream.get(False), self.downstream.get(True)
        return Evaluation(
            self.reconstruction.metrics(),
            None if scaled is None else scaled.metrics(),
            None if unscaled is None else unscaled.metrics(),
            self._context_means(),
        )

    def _context_means(self) -> ContextMeans:
        totals = {name: torch.cat(parts).cpu() for name, parts in self.by_context.items() if parts}
        n_tokens = totals.pop("tokens")
        known = n_tokens > 0
        means = {
            name: [round(value, 6) for value in (total[known] / n_tokens[known]).tolist()]
            for name, total in totals.items()
        }
        return ContextMeans(n_tokens[known].tolist(), means["norm_mse"], means.get("kl"))


def saelens_metrics(
    model: LanguageModel,
    sae: RoutedSAEMixin | CrosscoderSAEMixin,
    dataset: HfDataset | str,
    *,
    max_tokens: int = 50_000,
    batch_size: int = 8,
) -> dict[str, Any]:
    """SAELens's `run_evals` at the routed hook, with every metric on and at all positions.

    Its ablation sets the routed activation to zero, which leaves each token the mean of its stream;
    `kl_ablated` sets the stream itself to zero, as the paper's code does.

    Args:
        model: The model `sae` was trained on.
        sae: A RouteSAE or a crosscoder with its metadata.
        dataset: A dataset, or a name that `load_text_dataset` takes.
        max_tokens: Tokens to read for each of SAELens's two passes.
        batch_size: Contexts in one forward pass.
    """
    store = RoutedActivationsStore.from_sae(
        model, sae, dataset, store_batch_size_prompts=batch_size
    )
    n_batches = max(1, max_tokens // (batch_size * store.context_size))
    excluded = store.exclude_special_tokens
    with attach(model, sae):
        metrics, featurewise = run_evals(
            sae=sae,
            activation_store=store,
            model=cast(Any, model),
            activation_scaler=ActivationScaler(),
            eval_config=get_eval_everything_config(
                batch_size_prompts=batch_size,
                n_eval_reconstruction_batches=n_batches,
                n_eval_sparsity_variance_batches=n_batches,
            ),
            exclude_special_tokens=False if excluded is None else excluded.tolist(),
        )
    return {**metrics, "featurewise": featurewise}
