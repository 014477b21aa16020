"""A run's activations on disk: what they depend on, and passes that are computed only once.

A cache belongs to the model's weights, to the text, to how it is cut into contexts and to which
tokens are kept. A run that names one (`cache_activations`) reads the passes that are there and
appends those it has to compute, so it trains on the same numbers whether the cache was there or
not. Where a cache holds all that a run reads, the language model is not even loaded
(`cached_store.py`).
"""

from __future__ import annotations

import itertools
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import xxhash
from huggingface_hub import try_to_load_from_cache
from sae_lens.config import HfDataset
from tqdm.auto import tqdm
from transformer_lens.loading_from_pretrained import make_model_alias_map

from sae_lens_route.config import RouteSAERunnerConfig
from sae_lens_route.data.activation_shards import (
    ActivationShards,
    Manifest,
    file_checksum,
    passes_per_shard,
    read_manifest,
    require_disk,
)
from sae_lens_route.data.activations import RoutedActivationsStore
from sae_lens_route.data.row_digest import RowDigest
from sae_lens_route.data.text import load_text_dataset
from sae_lens_route.data.training_batches import BatchLayout
from sae_lens_route.errors import UserError
from sae_lens_route.models.kinds import LanguageModel, n_layers
from sae_lens_route.models.names import local_folder

_MADE_WITH = (
    "model_class_name",
    "model_from_pretrained_kwargs",
    "model_kwargs",
    "autocast_lm",
    "use_chat_formatting",
    "context_size",
    "prepend_bos",
    "disable_concat_sequences",
    "sequence_separator_token",
    "exclude_special_tokens",
    "seqpos_slice",
    "store_batch_size_prompts",
)
"""Fields of the configuration that decide what a pass computes."""

_COLUMNS = ("tokens", "input_ids", "text", "problem", "conversation", "conversations", "messages")
"""Columns that SAELens reads, the one it prefers first."""

_COMPARED_ROWS = 1_000
"""Rows of the text that are compared: to read all of a long one would take too long."""


class ActivationCache:
    """The cache that a run names in `cache_activations`.

    Args:
        cfg: The run.
        dataset: Its text, if it is not the one that `cfg.dataset_path` names.

    Raises:
        UserError: the folder holds the activations of another text, or of other contexts, or is
            damaged; the message names the field or the file.
    """

    def __init__(self, cfg: RouteSAERunnerConfig, dataset: HfDataset | None = None) -> None:
        assert cfg.cache_activations is not None
        self.folder, self._cfg = Path(cfg.cache_activations), cfg
        self.manifest = read_manifest(self.folder)
        self._made_with = _made_with(cfg, dataset)
        if self.manifest is not None:
            self._require_same(self.manifest, {**self._made_with, "cache_dtype": cfg.cache_dtype})

    def replaces_the_model(self) -> bool:
        """Whether it holds all that the run reads, so that the language model need not be loaded.

        Sets the routed blocks of the configuration if so.
        """
        cfg, manifest = self._cfg, self.manifest
        if manifest is None or cfg.logger.log_to_wandb:  # its evaluation runs the model
            return False
        if manifest.model_files is None or manifest.model_files != model_files(cfg):
            return False
        names = dict(zip(manifest.blocks, manifest.hook_names, strict=True))
        if not cfg.resolve_without_model(manifest.n_layers, manifest.width, names):
            return False
        n_tokens = BatchLayout.of(cfg, manifest.dtype).tokens_read(cfg.total_training_steps)
        return manifest.n_rows >= n_tokens

    def shards(self) -> ActivationShards:
        """What is there, for a run without the language model."""
        assert self.manifest is not None
        return ActivationShards(self.folder, self.manifest, 1)

    def attach(self, store: RoutedActivationsStore) -> ActivationShards:
        """Let a store read what is there, and write what it computes.

        Raises:
            UserError: what is there is another model's or lacks a block, or the disk has no room.
        """
        cfg, layout = self._cfg, store.layout
        weights = weights_digest(store.model)
        new = Manifest(
            made_with={**self._made_with, "weights": weights},
            text_sha256=store.text_sha256,
            model_files=model_files(cfg),
            blocks=list(cfg.routed_blocks or ()),
            hook_names=list(store.hook_names),
            n_layers=n_layers(store.model),
            width=layout.width,
            dtype=str(layout.dtype).removeprefix("torch."),
            cache_dtype=cfg.cache_dtype,
        )
        manifest = self.manifest or new
        self._require_same(manifest, {"weights": weights, "text_sha256": store.text_sha256})
        if missing := [name for name in store.hook_names if name not in manifest.hook_names]:
            raise UserError(f"{self._name}: holds blocks {manifest.blocks}, not {missing}")
        shards = ActivationShards(
            self.folder, manifest, passes_per_shard(manifest, layout.pass_tokens)
        )
        n_tokens = layout.tokens_read(cfg.total_training_steps) - manifest.n_rows
        if n_tokens > 0:
            if manifest.blocks != new.blocks:
                raise UserError(
                    f"{self._name}: holds {manifest.n_rows:,} tokens of blocks {manifest.blocks}, "
                    f"and only a run over the same blocks can write more, not {new.blocks}"
                )
            require_disk(self.folder, n_tokens * manifest.row_bytes, n_tokens)
        store.read_through(shards)
        return shards

    @property
    def _name(self) -> str:
        return f"cache_activations={str(self.folder)!r}"

    def _require_same(self, manifest: Manifest, wanted: dict[str, Any]) -> None:
        there = {**manifest.made_with, **vars(manifest)}
        for field, value in wanted.items():
            if there.get(field) != value:
                raise UserError(
                    f"{self._name}: was written with {field}={there.get(field)!r}, this run has "
                    f"{value!r}; take another folder, or delete that one"
                )


def write_cache(cfg: RouteSAERunnerConfig, model: LanguageModel) -> ActivationShards:
    """Write all that a run will read, with a progress bar; what is there already is kept.

    Args:
        cfg: The run; its `cache_activations` names the folder.
        model: Its language model.

    Raises:
        UserError: as `ActivationCache` and the run itself.
    """
    cfg.resolve(model)
    cache, store = ActivationCache(cfg), RoutedActivationsStore.from_config(model, cfg)
    shards = cache.attach(store)
    n_tokens = store.layout.tokens_read(cfg.total_training_steps)
    passes = store.passes()
    with closing(store), tqdm(total=n_tokens, unit="token", desc="caching activations") as progress:
        n_read = 0
        while n_read < n_tokens:
            n_read += len(passes.next_pass().kept)
            progress.update(min(n_read, n_tokens) - progress.n)
    return shards


def model_files(cfg: RouteSAERunnerConfig) -> str | None:
    """Identity of the files that a model is loaded from; None if it cannot be told without a hub.

    Of a folder the checksum of its weights and configuration, of a name on the Hub the revision
    that is in its cache.
    """
    folder = local_folder(cfg.model_name, cfg.model_class_name)
    if folder is None:
        name = make_model_alias_map().get(cfg.model_name.lower(), cfg.model_name)
        file = try_to_load_from_cache(name, "config.json")
        return f"{name}@{Path(file).parent.name}" if isinstance(file, str) else None
    digest = xxhash.xxh3_128()
    suffixes = {".safetensors", ".bin", ".json"}
    for path in sorted(path for path in folder.iterdir() if path.suffix in suffixes):
        digest.update(f"{path.name} {file_checksum(path)} ".encode())
    return digest.hexdigest()


def weights_digest(model: LanguageModel) -> str:
    """Checksum of a model's parameters, by name."""
    digest = xxhash.xxh3_128()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _made_with(cfg: RouteSAERunnerConfig, dataset: HfDataset | None) -> dict[str, Any]:
    """What the activations depend on, except the model."""
    text = load_text_dataset(cfg.dataset_path) if dataset is None else dataset
    digest = RowDigest()
    for row in itertools.islice(text, _COMPARED_ROWS):
        digest.add(next((row[column] for column in _COLUMNS if column in row), row))
    fields = {name: getattr(cfg, name) for name in _MADE_WITH}
    fields |= {"text": digest.hexdigest}
    return json.loads(json.dumps(fields, default=str))
