"""From text to aligned activations `[tokens, L, d]`, one forward pass for all routed layers.

1. `load_text_dataset` opens what `dataset_path` names: the demo corpus, local files or the Hub.
2. SAELens's `ActivationsStore` tokenises it and packs it into contexts.
3. The model runs up to the last routed block, without logits.
4. Tokens that are not excluded are written once into the batch that the trainer gets
   (passthrough, as the paper does), or into a preallocated shuffle buffer.
"""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import psutil
import torch
from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from jaxtyping import Bool, Float, Int
from sae_lens import logger
from sae_lens.config import HfDataset
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from sae_lens.training.activations_store import ActivationsStore, _get_input_token_device
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name, get_special_token_ids
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import override

from sae_lens_route.corpus import documents

if TYPE_CHECKING:
    from sae_lens_route.runner import RouteSAERunnerConfig

_BUILDER_OF_SUFFIX = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".txt": "text",
}


def load_text_dataset(path: str, *, streaming: bool = True) -> Dataset | IterableDataset:
    """Open a dataset with a `text` column, or a pretokenised one with `tokens`.

    Args:
        path: "demo" or "demo:heldout" (the two sides of the demo corpus), a local file or folder
            (jsonl, json, parquet, csv, txt, or `Dataset.save_to_disk`'s), or a Hub dataset.
        streaming: read while training instead of loading everything first.

    Raises:
        ValueError: nothing to read there, with what to do about it.
    """
    if path in ("demo", "demo:train", "demo:heldout"):
        texts = documents("heldout" if path.endswith("heldout") else "train")
        return Dataset.from_dict({"text": list(texts)})
    local = Path(path).expanduser()
    if local.exists():
        return _load_local(local, streaming)
    if path.startswith((".", "~", os.sep)) or path.count("/") > 1:
        raise ValueError(f"dataset_path={path!r}: no such file or folder")
    try:
        return _load_dataset(path, streaming=streaming)
    except (OSError, ValueError) as error:  # unknown, gated, or no network
        raise ValueError(
            f"dataset_path={path!r}: neither a local file or folder nor a dataset the Hub gives "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); 'demo' needs no network"
        ) from error


def _load_local(path: Path, streaming: bool) -> Dataset | IterableDataset:
    if path.is_dir() and (path / "dataset_info.json").exists():
        return cast(Dataset, load_from_disk(str(path)))
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    found = {p.suffix.lower() for p in files} & _BUILDER_OF_SUFFIX.keys()
    builders = {_BUILDER_OF_SUFFIX[suffix] for suffix in found}
    if len(builders) != 1:
        raise ValueError(
            f"dataset_path={str(path)!r}: holds {sorted(found) or 'no data files'}; put files of "
            f"one kind there ({', '.join(_BUILDER_OF_SUFFIX)})"
        )
    builder = builders.pop()
    chosen = [str(p) for p in files if _BUILDER_OF_SUFFIX.get(p.suffix.lower()) == builder]
    whole_files = {"sample_by": "document"} if builder == "text" else {}
    return _load_dataset(builder, data_files=chosen, streaming=streaming, **whole_files)


def _load_dataset(path: str, **options: Any) -> Dataset | IterableDataset:
    return cast(Dataset | IterableDataset, load_dataset(path, split="train", **options))


class _Pass(NamedTuple):
    """One forward pass of the language model over `store_batch_size_prompts` contexts."""

    layers: list[Float[Tensor, "tokens d"]]
    """Residual streams after the routed blocks, in order, all tokens."""
    kept: Int[Tensor, " kept"]
    """Which of those tokens are not excluded."""
    first_sequence: int
    """How many contexts had been read before this pass."""


class RoutedActivationsStore(ActivationsStore):
    """SAELens's store with all routed layers at once: batches are `[tokens, L, d]`.

    Tokenising, packing and excluding tokens are SAELens's. `activations_mixing_fraction=0` hands
    the tokens on in order; anything above keeps that fraction of a preallocated shuffle buffer of
    `n_batches_in_buffer * store_batch_size_prompts * context_size` tokens.

    In order, training can be resumed exactly: the checkpoint says how many contexts had been read
    and how many tokens of the current pass used. A shuffle buffer is refilled instead.
    """

    hook_names: list[str]

    @classmethod
    @override
    def from_config(  # type: ignore[override]
        cls,
        model: Any,
        cfg: RouteSAERunnerConfig,
        override_dataset: HfDataset | None = None,
    ) -> RoutedActivationsStore:
        """Store for a resolved runner configuration (its `hook_names` are known).

        Raises:
            ValueError: the dataset is missing, empty, or too short for one training step.
        """
        dataset = override_dataset
        if dataset is None:
            dataset = load_text_dataset(cfg.dataset_path, streaming=cfg.streaming)
        if next(iter(dataset), None) is None:
            raise ValueError(f"dataset_path={cfg.dataset_path!r}: the dataset is empty")
        with warnings.catch_warnings():
            # both compare or advise in units that do not fit text that is tokenised on the fly
            warnings.filterwarnings("ignore", message="Dataset is not tokenized")
            warnings.filterwarnings("ignore", message="The training dataset contains fewer samples")
            store = super().from_config(model, cfg, override_dataset=dataset)
        assert isinstance(store, RoutedActivationsStore)
        store._start(cfg.hook_names or [], cfg.seed)
        store._require_one_step(cfg)
        return store

    @classmethod
    @override
    def from_sae(  # type: ignore[override]
        cls, model: Any, sae: Any, dataset: HfDataset | str, **options: Any
    ) -> RoutedActivationsStore:
        """Store that reads text as `sae` was trained: context, BOS, excluded tokens, layers.

        Args:
            model: The model `sae` was trained on.
            sae: A RouteSAE with its metadata.
            dataset: A loaded dataset, or what `load_text_dataset` takes.
            options: Those of SAELens's `ActivationsStore.from_sae`.
        """
        metadata = sae.cfg.metadata
        if isinstance(dataset, str):
            dataset = load_text_dataset(dataset)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Dataset is not tokenized")
            warnings.filterwarnings("ignore", message="The training dataset contains fewer samples")
            store = super().from_sae(model, sae, dataset, **options)
        assert isinstance(store, RoutedActivationsStore)
        store.activations_mixing_fraction = 0.0
        excluded = metadata.exclude_special_tokens
        if excluded is True:
            excluded = get_special_token_ids(model.tokenizer)
        if excluded:
            store.exclude_special_tokens = torch.tensor(excluded, device=store.device)
        store._start(metadata.hook_names or [], seed=0)
        return store

    def _start(self, hook_names: list[str], seed: int) -> None:
        self.hook_names = list(hook_names)
        self._generator = torch.Generator().manual_seed(seed)
        self._n_sequences = 0
        self._pass: _Pass | None = None
        self._n_used = 0

    def _require_one_step(self, cfg: RouteSAERunnerConfig) -> None:
        """Read what the first step needs now, so that a short dataset fails before the work."""
        needed = max(
            self.store_batch_size_prompts,
            math.ceil(self.train_batch_size_tokens / self.training_context_size),
        )
        first = list(itertools.islice(self.iterable_sequences, needed))
        if len(first) < needed:
            raise ValueError(
                f"dataset_path={cfg.dataset_path!r}: only {len(first)} contexts of "
                f"context_size={cfg.context_size} tokens, one step needs {needed} "
                f"(store_batch_size_prompts={cfg.store_batch_size_prompts}, "
                f"train_batch_size_tokens={cfg.train_batch_size_tokens}): lower those or add text"
            )
        self.iterable_sequences = itertools.chain(first, self.iterable_sequences)  # type: ignore

    @override
    def get_batch_tokens(
        self,
        batch_size: int | None = None,
        raise_at_epoch_end: bool = False,
        move_to_model_device: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """The next contexts; counts them, so that a checkpoint knows where the text stopped."""
        tokens = super().get_batch_tokens(batch_size, raise_at_epoch_end, move_to_model_device)
        self._n_sequences += len(tokens)
        return tokens

    @torch.no_grad()
    def layer_activations(
        self, batch_tokens: Int[Tensor, "batch pos"]
    ) -> list[Float[Tensor, "batch pos d"]]:
        """Residual streams after the routed blocks, in order; blocks above do not run."""
        with torch.autocast(
            device_type=_get_input_token_device(self.model).type,
            dtype=torch.bfloat16,
            enabled=self.autocast_lm,
        ):
            cache = self.model.run_with_cache(
                batch_tokens,
                names_filter=self.hook_names,
                stop_at_layer=extract_stop_at_layer_from_tlens_hook_name(self.hook_names[-1]),
                prepend_bos=False,
                **self.model_kwargs,
            )[1]
        return [cache[name][:, slice(*self.seqpos_slice)] for name in self.hook_names]

    @override
    def get_activations(
        self, batch_tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos L d"]:
        """Residual streams after the routed blocks, stacked."""
        return torch.stack(self.layer_activations(batch_tokens), dim=2).to(self.device)

    def token_batches(self, max_tokens: int) -> Iterator[Int[Tensor, "batch pos"]]:
        """Contexts for evaluation, on the model's device: ends with the text or at `max_tokens`.

        The last batch can be smaller; at least one context is given.
        """
        n_contexts = max(1, max_tokens // self.context_size)
        contexts = itertools.islice(self.iterable_sequences, n_contexts)
        device = _get_input_token_device(self.model)
        while batch := list(itertools.islice(contexts, self.store_batch_size_prompts)):
            yield torch.stack(batch).to(device)

    def activation_batches(self, max_tokens: int) -> Iterator[Float[Tensor, "tokens L d"]]:
        """Activations of the tokens that `token_batches` gives and `kept` keeps."""
        for tokens in self.token_batches(max_tokens):
            kept = self.kept(tokens)[:, slice(*self.seqpos_slice)]
            yield self.get_activations(tokens)[kept]

    def kept(self, batch_tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """Which tokens are not excluded from training and evaluation."""
        if self.exclude_special_tokens is None:
            return torch.ones_like(batch_tokens, dtype=torch.bool)
        excluded = self.exclude_special_tokens.to(batch_tokens.device)
        return torch.isin(batch_tokens, excluded, invert=True)

    def _next_pass(self) -> _Pass:
        first_sequence = self._n_sequences
        tokens = self.get_batch_tokens()
        layers = [layer.flatten(0, 1) for layer in self.layer_activations(tokens)]
        kept = self.kept(tokens[:, slice(*self.seqpos_slice)]).flatten().nonzero().squeeze(-1)
        if first_sequence == 0:
            self._require_finite(layers)
        return _Pass(layers, kept, first_sequence)

    def _require_finite(self, layers: list[Tensor]) -> None:
        for name, layer in zip(self.hook_names, layers, strict=True):
            if not torch.isfinite(layer).all():
                raise ValueError(
                    f"the model's activations at {name} contain NaN or inf (dtype {layer.dtype}): "
                    "load it in another dtype, or leave that block out of routed_layers"
                )

    def _fill(self, out: Float[Tensor, "rows L d"], rows: Int[Tensor, " n"] | None = None) -> None:
        """Write the next tokens into `out`, or into its given rows: the one copy they get."""
        n_rows = len(out) if rows is None else len(rows)
        filled = 0
        while filled < n_rows:
            if self._pass is None or self._n_used == len(self._pass.kept):
                self._pass, self._n_used = self._next_pass(), 0
            n = min(n_rows - filled, len(self._pass.kept) - self._n_used)
            kept = self._pass.kept[self._n_used : self._n_used + n]
            target = slice(filled, filled + n) if rows is None else rows[filled : filled + n]
            for i, layer in enumerate(self._pass.layers):
                out[target, i] = layer[kept].to(out.device)
            filled += n
            self._n_used += n

    def _empty(self, n_tokens: int) -> Tensor:
        dtype = torch.bfloat16 if self.autocast_lm else self._model_dtype()
        return torch.empty(
            n_tokens, len(self.hook_names), self.d_in, dtype=dtype, device=self.device
        )

    def _model_dtype(self) -> torch.dtype:
        """Activations keep the model's dtype: it is lossless, and the SAE casts what it reads."""
        return next(self.model.parameters()).dtype

    @property
    def buffer_tokens(self) -> int:
        """Tokens in the shuffle buffer; 0 when tokens are handed on in order."""
        if self.activations_mixing_fraction == 0:
            return 0
        contexts = self.n_batches_in_buffer * self.store_batch_size_prompts
        return contexts * self.training_context_size

    @override
    def get_data_loader(self) -> Iterator[Float[Tensor, "tokens L d"]]:
        """Endless batches of `train_batch_size_tokens` tokens."""
        return self._shuffled() if self.buffer_tokens else self._in_order()

    def _in_order(self) -> Iterator[Tensor]:
        while True:
            # a new tensor each time: the trainer may still hold the last one (prefetching does)
            batch = self._empty(self.train_batch_size_tokens)
            self._fill(batch)
            yield batch

    def _shuffled(self) -> Iterator[Tensor]:
        n, batch_size = self.buffer_tokens, self.train_batch_size_tokens
        if n < batch_size:
            raise ValueError(
                f"n_batches_in_buffer={self.n_batches_in_buffer}: the shuffle buffer would hold "
                f"{n:,} tokens, fewer than train_batch_size_tokens={batch_size:,}"
            )
        itemsize = self._model_dtype().itemsize
        n_bytes = n * len(self.hook_names) * self.d_in * itemsize
        logger.info(
            f"shuffle buffer: {n:,} tokens x {len(self.hook_names)} layers x {self.d_in} = "
            f"{n_bytes / 1e9:.2f} GB on {self.device}"
        )
        require_memory(n_bytes, self.device, "n_batches_in_buffer", self.n_batches_in_buffer)
        buffer = self._empty(n)
        self._fill(buffer)
        n_served = max(1, int(n * (1 - self.activations_mixing_fraction)) // batch_size)
        while True:
            order = torch.randperm(n, generator=self._generator).to(self.device)
            served = order[: n_served * batch_size]
            for rows in served.split(batch_size):
                yield buffer[rows]
            self._fill(buffer, served)

    @override
    def state_dict(self) -> dict[str, Tensor]:
        """Where the text stopped: contexts read before the current pass, tokens used of it."""
        start = self._n_sequences if self._pass is None else self._pass.first_sequence
        return {
            "n_dataset_processed": torch.tensor(self.n_dataset_processed),
            "n_sequences": torch.tensor(start),
            "n_used": torch.tensor(self._n_used),
        }

    @override
    def load_from_checkpoint(self, checkpoint_path: str | Path) -> None:
        """Continue where `save_to_checkpoint` stopped: skips the text, runs one pass again."""

        state = load_file(Path(checkpoint_path) / ACTIVATIONS_STORE_STATE_FILENAME)
        target = int(state["n_sequences"])
        while self._n_sequences < target:
            n = min(self.store_batch_size_prompts, target - self._n_sequences)
            self.get_batch_tokens(n, move_to_model_device=False)
        self._pass, self._n_used = None, 0
        if n_used := int(state["n_used"]):
            self._pass, self._n_used = self._next_pass(), n_used


def require_memory(n_bytes: int, device: torch.device | str, field: str, value: object) -> None:
    """Raise if `n_bytes` are not free on a device, naming the field that asks for them."""
    device = torch.device(device)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu":
        free = psutil.virtual_memory().available
    else:
        return
    if n_bytes > free:
        raise ValueError(
            f"{field}={value}: would take {n_bytes / 1e9:.1f} GB on {device}, where "
            f"{free / 1e9:.1f} GB are free; lower it"
        )
