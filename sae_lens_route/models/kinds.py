"""The three kinds of language model, and everything that differs between them.

| kind    | class                                | residual stream after block 3           |
|---------|--------------------------------------|-----------------------------------------|
| hooked  | TransformerLens's HookedTransformer  | `blocks.3.hook_resid_post`              |
| bridge  | TransformerLens's TransformerBridge  | `blocks.3.hook_out`                     |
| proxy   | SAELens's HookedProxyLM around a     | `model.layers.3`, `transformer.h.3`, …  |
|         | Hugging Face model                   |                                         |

The rest of the package asks here and never checks a model's class itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from sae_lens.load_model import HookedProxyLM
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from sae_lens_route.errors import UserError

if TYPE_CHECKING:
    # A bridge offers the interface of HookedRootModule without being one, so at run time (where
    # beartype looks) only nn.Module is true of all three kinds.
    from transformer_lens.HookedTransformer import HookedRootModule as LanguageModel
else:
    LanguageModel = nn.Module


# --- sizes and parts -----------------------------------------------------------------------------


def n_layers(model: LanguageModel) -> int:
    """Number of blocks."""
    if isinstance(model, HookedProxyLM):
        return _text_config(model).num_hidden_layers
    return cast("Any", model).cfg.n_layers


def d_model(model: LanguageModel) -> int:
    """Width of the residual stream."""
    if isinstance(model, HookedProxyLM):
        return _text_config(model).hidden_size
    return cast("Any", model).cfg.d_model


def context_length(model: LanguageModel) -> int | None:
    """Most tokens the model reads at once; None if its configuration does not say."""
    if isinstance(model, HookedProxyLM):
        return getattr(_text_config(model), "max_position_embeddings", None)
    return cast("Any", model).cfg.n_ctx


def vocabulary_size(model: LanguageModel) -> int:
    """Number of token ids that the model has an embedding for."""
    return len(next(token_embedding(model).parameters()))


def model_device(model: LanguageModel) -> torch.device:
    """Device of the model's parameters, to which its token ids are moved."""
    return next(model.parameters()).device


def tokenizer_of(model: LanguageModel) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        UserError: the model has none.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise UserError("model.tokenizer is None: set it to the Hugging Face tokenizer first")
    return tokenizer


def token_embedding(model: LanguageModel) -> nn.Module:
    """The module that maps token ids `[batch, pos]` to `[batch, pos, d_model]`."""
    if isinstance(model, HookedProxyLM):
        return cast("Any", model.model).get_input_embeddings()
    return cast("Any", model).embed


def decoder_blocks(model: LanguageModel) -> list[nn.Module]:
    """The blocks in order; `residual_of` a block's output is the residual stream after it."""
    if isinstance(model, HookedProxyLM):
        return list(_proxy_blocks(model)[1])
    return list(cast("Any", model).blocks)


def block_loop(model: LanguageModel) -> nn.Module:
    """The module whose `forward` runs the blocks one after another: a pass is one call of it."""
    if not isinstance(model, HookedProxyLM):
        return model
    path, _ = _proxy_blocks(model)
    return model.model.get_submodule(path.rpartition(".")[0])


def _text_config(model: HookedProxyLM) -> Any:
    return cast("Any", model.model).config.get_text_config()


def _proxy_blocks(model: HookedProxyLM) -> tuple[str, nn.ModuleList]:
    """The decoder's blocks, and the list's name; lists of experts or vision towers are deeper."""
    n = _text_config(model).num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n
    ]
    if not lists:
        raise UserError(
            f"no list of {n} blocks in {type(model.model).__name__}; RouteSAE needs a model whose "
            "blocks are one nn.ModuleList"
        )
    return min(lists, key=lambda item: item[0].count("."))


# --- the residual stream -------------------------------------------------------------------------


def residual_hook_names(model: LanguageModel, blocks: Sequence[int]) -> list[str]:
    """Hook names of the residual stream after each of `blocks`, as this kind of model spells them.

    Raises:
        UserError: a block that the model does not have.
    """
    n = n_layers(model)
    outside = [block for block in blocks if not 0 <= block < n]
    if outside:
        raise UserError(
            f"routed_blocks={list(blocks)}: {outside} out of range, "
            f"the model has blocks 0 to {n - 1}"
        )
    if isinstance(model, HookedProxyLM):
        name, _ = _proxy_blocks(model)
        return [f"{name}.{block}" for block in blocks]
    suffix = "hook_resid_post" if isinstance(model, HookedTransformer) else "hook_out"
    return [f"blocks.{block}.{suffix}" for block in blocks]


def default_routed_blocks(n_layers: int) -> list[int]:
    """Blocks `n//4 - 1 … 3n//4 - 1`, the paper's choice (3 to 11 of 16), but none below 0.

    Raises:
        UserError: `n_layers` below 1.
    """
    if n_layers < 1:
        raise UserError(f"n_layers={n_layers}: must be at least 1")
    first, last = n_layers // 4 - 1, 3 * n_layers // 4 - 1
    return list(range(max(first, 0), max(last, 0) + 1))


def residual_of(output: Tensor | tuple[Any, ...]) -> Float[Tensor, "batch pos d"]:
    """The residual stream in a block's output, in transformers up to 4.53 the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_residual(
    output: Tensor | tuple[Any, ...], x: Float[Tensor, "batch pos d"]
) -> Tensor | tuple[Any, ...]:
    """A block's output with the residual stream `x` in place of its own."""
    return (x, *output[1:]) if isinstance(output, tuple) else x


# --- an additional hook point --------------------------------------------------------------------


def hook_point_home(model: LanguageModel, block: nn.Module, name: str) -> HookPointHome:
    """Where a new hook point `name`, one of `block`, is to live; `.add()` creates it there.

    Raises:
        UserError: the name is taken, or is not that of a hook point in a block.
    """
    path = name.split(".")[2:]
    if not 1 <= len(path) <= 2 or "" in path:
        raise UserError(f"hook_name={name!r}: must be blocks.N.NAME or blocks.N.MODULE.NAME")
    is_proxy = isinstance(model, HookedProxyLM)
    if name in cast("Any", model).hook_dict or (not is_proxy and hasattr(block, path[0])):
        raise UserError(f"hook_name={name!r} is taken by another part of the model")
    if is_proxy:
        return ProxyHookPointHome(model, block, name)
    hooked = isinstance(model, HookedTransformer)
    return (HookPointHome if hooked else BridgeHookPointHome)(model, block, name)


class HookPointHome:
    """In a HookedTransformer: an attribute of the block, or of a small module that the block gets.

    `add_sae` replaces the attribute, so it is looked up each time.
    """

    def __init__(self, model: LanguageModel, block: nn.Module, name: str) -> None:
        self.model: Any = model
        self.block, self.name = block, name
        *module, self.attribute = name.split(".")[2:]
        self.module = ".".join(module)  # "" for the block itself

    @property
    def _holder(self) -> nn.Module:
        return self.block.get_submodule(self.module)

    def get(self) -> nn.Module:
        """The HookPoint, or the wrapper of an SAE that was added at it."""
        return getattr(self._holder, self.attribute)

    def add(self) -> None:
        """Create the hook point."""
        self._set(HookPoint())
        self.model.setup()

    def remove(self) -> None:
        """Delete the hook point; the model is as it was."""
        self._delete()
        self.model.setup()

    def _set(self, hook_point: HookPoint) -> None:
        if self.module:
            self.block.add_module(self.module, nn.Module())
        setattr(self._holder, self.attribute, hook_point)

    def _delete(self) -> None:
        delattr(self.block, self.module or self.attribute)


class BridgeHookPointHome(HookPointHome):
    """The same in a bridge, whose registries are never rebuilt: they are written by hand."""

    @override
    def add(self) -> None:
        hook_point = HookPoint()
        self._set(hook_point)
        self.model._hook_registry[self.name] = hook_point
        hook_point.name = self.name

    @override
    def remove(self) -> None:
        self._delete()
        cast("Any", self.block)._hook_registry.pop(self.attribute, None)
        self.model._hook_registry.pop(self.name, None)


class ProxyHookPointHome(HookPointHome):
    """In a proxy: an entry of its dictionaries; `stop_at_layer` looks the block up by its name."""

    @override
    def get(self) -> nn.Module:
        return self.model.hook_dict[self.name]

    @override
    def add(self) -> None:
        hook_point = HookPoint()
        hook_point.name = self.name
        self.model.hook_dict[self.name] = self.model.mod_dict[self.name] = hook_point
        self.model.named_modules_dict[self.name] = self.block

    @override
    def remove(self) -> None:
        for names in (self.model.hook_dict, self.model.mod_dict, self.model.named_modules_dict):
            del names[self.name]
