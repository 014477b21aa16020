"""From contexts to aligned activations `[tokens, L, d]`, one forward pass for all routed blocks.

1. SAELens's `ActivationsStore` tokenizes the text and packs it into contexts.
2. The model runs up to the last routed block, without logits.
3. Kept tokens are written once: into the batch that the trainer gets (in order, as in the paper),
   or into a preallocated shuffle buffer.

A position (`state_dict`) says how many contexts had been read before the current pass, how many
tokens of that pass had been used, which text that was (`data/row_digest.py`), and what
`data/shuffle_buffer.py` adds. From there the same batches follow, bit for bit.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import threading
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from sae_lens.config import HfDataset
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import override

from sae_lens_route.config import RouteSAERunnerConfig
from sae_lens_route.data.activation_shards import ActivationShards
from sae_lens_route.data.cached_passes import CachedPasses
from sae_lens_route.data.kept_stream import ForwardPass, PassSource
from sae_lens_route.data.kept_tokens import KeptTokens, excluded_token_ids
from sae_lens_route.data.row_digest import RowDigest
from sae_lens_route.data.rows import checked_rows, text_problem, tokens_problem
from sae_lens_route.data.text import load_text_dataset
from sae_lens_route.data.training_batches import BatchLayout, TrainingBatches
from sae_lens_route.errors import UserError
from sae_lens_route.models.kinds import LanguageModel, d_model, vocabulary_size
from sae_lens_route.saes.metadata import source_hook_names


@torch.no_grad()
def residual_streams(
    model: LanguageModel,
    tokens: Int[Tensor, "batch pos"],
    hook_names: list[str],
    autocast: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
) -> list[Float[Tensor, "batch pos d"]]:
    """Residual streams at the given hooks, in order; the blocks above the last do not run.

    Args:
        model: Anything with TransformerLens's `run_with_cache`.
        tokens: Token ids, with BOS if the SAE was trained with it.
        hook_names: As the model spells them, ascending by block.
        autocast: Whether the model runs in bfloat16 autocast (`autocast_lm`).
        model_kwargs: Further arguments of the model's forward pass.
    """
    stop = extract_stop_at_layer_from_tlens_hook_name(hook_names[-1])
    with _autocast(tokens.device.type, autocast):
        _, cache = cast(Any, model).run_with_cache(
            tokens,
            names_filter=hook_names,
            stop_at_layer=stop,
            prepend_bos=False,
            **(model_kwargs or {}),
        )
    return [cache[name] for name in hook_names]


def _autocast(device_type: str, enabled: bool) -> AbstractContextManager[object]:
    """Bfloat16 autocast, or full precision where the caller has it on."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=enabled)


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turn what SAELens raises about a dataset into UserErrors; hide two warnings that mislead.

    Both warnings compare or advise in units that do not fit text that is tokenized on the fly.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Dataset is not tokenized")
        warnings.filterwarnings("ignore", message="The training dataset contains fewer samples")
        try:
            yield
        except ValueError as error:
            raise UserError(
                f"the dataset cannot be read: {' '.join(str(error).split())}"
            ) from error


def _opened(dataset: HfDataset | str, streaming: bool = True) -> HfDataset:
    name = f"dataset_path={dataset!r}: " if isinstance(dataset, str) else ""
    if isinstance(dataset, str):
        dataset = load_text_dataset(dataset, streaming=streaming)
    if next(iter(dataset), None) is None:
        raise UserError(f"{name}the dataset is empty")
    return dataset


class RoutedActivationsStore(ActivationsStore):
    """SAELens's store with all routed blocks at once: batches are `[tokens, L, d]`.

    SAELens tokenizes and packs. `activations_mixing_fraction=0` yields the tokens in order; a
    higher value keeps that fraction of a preallocated shuffle buffer of
    `n_batches_in_buffer * store_batch_size_prompts * context_size` tokens.

    `model_lock` is held while the store runs the model or its tokenizer. Code that changes the
    model for a while, such as an evaluation that attaches an SAE, holds it against a thread that
    prefetches.
    """

    hook_names: list[str]
    text_sha256: str = ""
    """Of the contexts of the first pass: tells one text, or tokenizer, from another."""
    _shards: ActivationShards | None

    @classmethod
    @override
    def from_config(  # type: ignore[override]
        cls,
        model: LanguageModel,
        cfg: RouteSAERunnerConfig,
        override_dataset: HfDataset | None = None,
    ) -> RoutedActivationsStore:
        """Store for a resolved runner configuration (its `hook_names` are known).

        Raises:
            UserError: the dataset is missing, empty, or too short for one training step.
        """
        tokenizer = getattr(model, "tokenizer", None)
        excluded = excluded_token_ids(cfg.exclude_special_tokens, tokenizer)
        dataset = cfg.dataset_path if override_dataset is None else override_dataset
        dataset = _opened(dataset, cfg.streaming)
        with _user_errors():
            store = super().from_config(cast(Any, model), cfg, override_dataset=dataset)
        assert isinstance(store, RoutedActivationsStore)
        kept_tokens = KeptTokens(tuple(excluded), tuple(cfg.seqpos_slice))
        store._initialize(cfg.hook_names or [], kept_tokens, cfg.seed)
        store._require_one_step(cfg)
        return store

    @classmethod
    @override
    def from_sae(  # type: ignore[override]
        cls, model: LanguageModel, sae: Any, dataset: HfDataset | str, **options: Any
    ) -> RoutedActivationsStore:
        """Store that reads text in order, as `sae` was trained: contexts, kept tokens and blocks.

        Args:
            model: The model `sae` was trained on.
            sae: A RouteSAE or crosscoder with its metadata.
            dataset: A loaded dataset, or a path for `load_text_dataset`.
            options: Those of SAELens's `ActivationsStore.from_sae`.

        Raises:
            UserError: the dataset is missing or empty, or the metadata does not say how to read.
        """
        packing = {
            field: sae.cfg.metadata[field]
            for field in ("disable_concat_sequences", "sequence_separator_token")
            if field in sae.cfg.metadata
        }
        kept_tokens = KeptTokens.of(sae, getattr(model, "tokenizer", None))
        dataset = _opened(dataset)
        with _user_errors():
            store = super().from_sae(cast(Any, model), sae, dataset, **{**packing, **options})
        assert isinstance(store, RoutedActivationsStore)
        store.activations_mixing_fraction = 0.0
        store._initialize(source_hook_names(sae), kept_tokens, seed=0)
        return store

    def _initialize(self, hook_names: list[str], kept_tokens: KeptTokens, seed: int) -> None:
        self.hook_names = list(hook_names)
        self._kept_tokens = kept_tokens
        ids = kept_tokens.excluded_ids
        # what SAELens's own evaluation reads
        self.exclude_special_tokens = torch.tensor(ids, device=self.device) if ids else None
        self.model_lock = threading.RLock()
        self._vocabulary_size = vocabulary_size(self.model)
        self._seed, self._shards = seed, None
        self._rewind()

    def _rewind(self) -> None:
        """Go to the start of the text."""
        self.iterable_sequences = self._iterate_tokenized_sequences()
        self._dataloader = None
        self._n_sequences = self.n_dataset_processed = 0
        self._rows_read = RowDigest()
        self._batches = TrainingBatches(self.passes(), self.layout)

    def passes(self) -> PassSource:
        """Where its passes come from: the model, or a cache with the model behind it."""
        if self._shards is None:
            return self
        blocks = self._shards.manifest.hook_names
        positions = [blocks.index(name) for name in self.hook_names]
        n = self.store_batch_size_prompts
        return CachedPasses(self._shards, positions, n, self, self.model_lock)

    def read_through(self, shards: ActivationShards) -> None:
        """From the start of the text: read the passes of a cache, and append to it."""
        self._shards = shards
        self._rewind()

    def close(self) -> None:
        """Write the rest of what was computed to the cache, if there is one."""
        if self._shards is not None:
            with self.model_lock:
                self._shards.close()

    def from_the_start(self) -> RoutedActivationsStore:
        """Another store on the same text and model, at the start of the text."""
        store = copy.copy(self)
        store._rewind()
        return store

    @override
    def _iterate_raw_dataset(self) -> Generator[Any, None, None]:
        assert self.dataset is not None
        for value in checked_rows(self.dataset, self.tokens_column, self._problem):
            self._rows_read.add(value)
            yield value
            self.n_dataset_processed += 1

    def _problem(self, value: Any) -> str | None:
        if self.use_chat_formatting:
            return None
        if self.is_dataset_tokenized:
            return tokens_problem(value, self.context_size, self._vocabulary_size)
        return text_problem(value)

    def _require_one_step(self, cfg: RouteSAERunnerConfig) -> None:
        """Read the first step's contexts now, so that a short dataset fails before training."""
        needed = max(
            self.store_batch_size_prompts,
            math.ceil(self.train_batch_size_tokens / max(1, self.training_context_size)),
        )
        first = list(itertools.islice(self.iterable_sequences, needed))
        if len(first) < needed:
            raise UserError(
                f"dataset_path={cfg.dataset_path!r}: only {len(first)} contexts of "
                f"context_size={cfg.context_size} tokens, one step needs {needed} "
                f"(store_batch_size_prompts={cfg.store_batch_size_prompts}, "
                f"train_batch_size_tokens={cfg.train_batch_size_tokens}): lower those or add text"
            )
        contexts = torch.stack(first)
        if not self._kept_tokens.mask(contexts).any():
            raise UserError(
                f"no token of the first {len(first)} contexts is kept: change "
                f"exclude_special_tokens or seqpos_slice={self.seqpos_slice}"
            )
        first_pass = contexts[: self.store_batch_size_prompts].cpu().numpy()
        self.text_sha256 = hashlib.sha256(first_pass.tobytes()).hexdigest()
        self.iterable_sequences = itertools.chain(first, self.iterable_sequences)  # type: ignore

    @override
    def get_batch_tokens(
        self,
        batch_size: int | None = None,
        raise_at_epoch_end: bool = False,
        move_to_model_device: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """The next contexts; counts them, so that a checkpoint holds the position in the text."""
        tokens = super().get_batch_tokens(batch_size, raise_at_epoch_end, move_to_model_device)
        self._n_sequences += len(tokens)
        self._rows_read.check(self._n_sequences)
        return tokens

    @override
    def get_activations(
        self, batch_tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos L d"]:
        """Residual streams after the routed blocks, stacked, at the positions that are kept."""
        positions = slice(*self.seqpos_slice)
        streams = [x[:, positions].to(self.device) for x in self._streams(batch_tokens)]
        return torch.stack(streams, dim=2)

    def token_batches(self, max_tokens: int) -> Iterator[Int[Tensor, "batch pos"]]:
        """Contexts for evaluation: ends with the text or at `max_tokens`.

        The last batch can be smaller; at least one context is yielded.
        """
        n_contexts = max(1, max_tokens // self.context_size)
        contexts = itertools.islice(self.iterable_sequences, n_contexts)
        while batch := list(itertools.islice(contexts, self.store_batch_size_prompts)):
            yield torch.stack(batch)

    def _streams(self, tokens: Int[Tensor, "batch pos"]) -> list[Float[Tensor, "batch pos d"]]:
        return residual_streams(
            self.model, tokens, self.hook_names, self.autocast_lm, self.model_kwargs
        )

    def next_pass(self) -> ForwardPass:
        """Run the model on the next contexts."""
        first_sequence = self._n_sequences
        with self.model_lock:
            tokens = self.get_batch_tokens()
            streams = [stream.flatten(0, 1) for stream in self._streams(tokens)]
        kept = self._kept_tokens.mask(tokens).flatten().nonzero().squeeze(-1)
        if first_sequence == 0:
            self._require_finite(streams)
        return ForwardPass(streams, kept, first_sequence)

    def _require_finite(self, streams: list[Tensor]) -> None:
        for name, stream in zip(self.hook_names, streams, strict=True):
            if not torch.isfinite(stream).all():
                raise UserError(
                    f"the model's activations at {name} contain NaN or inf (dtype {stream.dtype}): "
                    "load it in another dtype, or leave that block out of routed_blocks"
                )

    def skip_to(self, n_contexts: int) -> None:
        """Read the text up to a number of contexts, without the model."""
        while self._n_sequences < n_contexts:
            n = min(self.store_batch_size_prompts, n_contexts - self._n_sequences)
            self.get_batch_tokens(n, move_to_model_device=False)

    def _stream_dtype(self) -> torch.dtype:
        """Dtype in which the model adds up its residual streams, and in which they are kept.

        That of its weights. Under autocast a block's output is bfloat16, but it is added to the
        stream before it: the streams of a float32 model remain float32.
        """
        dtype = next(self.model.parameters()).dtype
        return torch.promote_types(dtype, torch.bfloat16) if self.autocast_lm else dtype

    @property
    def layout(self) -> BatchLayout:
        """What its batches are made of."""
        return BatchLayout(
            n_blocks=len(self.hook_names),
            width=d_model(self.model),
            dtype=self._stream_dtype(),
            device=torch.device(self.device),
            batch_size=self.train_batch_size_tokens,
            pass_tokens=self.store_batch_size_prompts * self.training_context_size,
            n_batches_in_buffer=self.n_batches_in_buffer,
            kept_share=self.activations_mixing_fraction,
            seed=self._seed,
        )

    @override
    def get_data_loader(self) -> Iterator[Float[Tensor, "tokens L d"]]:
        """Endless batches of `train_batch_size_tokens` tokens."""
        return iter(self._batches)

    @override
    def state_dict(self) -> dict[str, Tensor]:
        """The position after the last batch; see the module's docstring."""
        return {
            "n_dataset_processed": torch.tensor(self.n_dataset_processed),
            **self._rows_read.state(self._n_sequences),
            **self._batches.state(),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go to a position, as `TrainingBatches.load` does."""
        self._rewind()
        self._rows_read.expect(state)
        self._batches.load(state)

    @override
    def load_from_checkpoint(self, checkpoint_path: str | Path) -> None:
        """Go to the position of a checkpoint."""
        self.load_state(load_file(Path(checkpoint_path) / ACTIVATIONS_STORE_STATE_FILENAME))
