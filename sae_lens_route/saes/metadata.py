"""Hook names and blocks in an SAE's metadata: the streams it reads, the hook that it gets.

A *block* is the model's index of a transformer block. A *route* is a position among the routed
blocks, 0 … L-1: what the router's logits, `Routing.route` and `Routing.probs` count in. Everything
that people read names blocks.
"""

from __future__ import annotations

import re
from typing import Any

from sae_lens_route.errors import UserError

_BLOCK = re.compile(r"(?:^|\.)(\d+)(?:\.hook_resid_post|\.hook_out)?$")


def routed_hook_name(last_block: int) -> str:
    """Name of the hook point that the routed activation passes through."""
    return f"blocks.{last_block}.route.hook_resid_post"


def crosscoder_hook_name(last_block: int) -> str:
    """Name of the hook point that the concatenated streams of a crosscoder pass through."""
    return f"blocks.{last_block}.stack.hook_resid_post"


def source_hook_names(sae: Any) -> list[str]:
    """The L residual streams the SAE reads, in the order of its routes, as the model spells them.

    Raises:
        UserError: the metadata does not name one hook per route.
    """
    names = sae.cfg.metadata.hook_names or []
    if len(names) != sae.cfg.n_routed_layers:
        raise UserError(
            f"metadata.hook_names={names}: the SAE has n_routed_layers="
            f"{sae.cfg.n_routed_layers}; name one hook per route, in order"
        )
    return list(names)


def routed_blocks(sae: Any) -> list[int]:
    """Block of each route, in order: `metadata.routed_blocks`, or as the hook names say.

    Raises:
        UserError: neither names one block per route.
    """
    blocks = _named_blocks(sae)
    if blocks is None:
        return blocks_of_hooks(source_hook_names(sae))
    if len(blocks) != sae.cfg.n_routed_layers:
        raise UserError(
            f"metadata.routed_blocks={blocks}: the SAE has n_routed_layers="
            f"{sae.cfg.n_routed_layers}; name one block per route, in order"
        )
    return [int(block) for block in blocks]


def route_names(sae: Any) -> list[str]:
    """Name of each route in logs: `block_11`, or `route_2` if the metadata names no blocks."""
    if _named_blocks(sae) is None:
        return [f"route_{route}" for route in range(sae.cfg.n_routed_layers)]
    return [f"block_{block}" for block in routed_blocks(sae)]


def _named_blocks(sae: Any) -> list[int] | None:
    metadata = sae.cfg.metadata
    return metadata.routed_blocks or metadata.routed_layers  # the name before 0.1.0


def blocks_of_hooks(hook_names: list[str]) -> list[int]:
    """Block that each residual-stream hook follows, read off its name.

    Raises:
        UserError: a name that is not a residual stream after a block.
    """
    matches = [(name, _BLOCK.search(name)) for name in hook_names]
    if unknown := [name for name, match in matches if match is None]:
        raise UserError(f"hook_names={unknown}: not residual streams after blocks")
    return [int(match[1]) for _, match in matches if match is not None]
