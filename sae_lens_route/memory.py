"""Refusing a device that is not there, and what does not fit in its memory, before any work."""

from __future__ import annotations

import psutil
import torch

from sae_lens_route.errors import UserError


def require_device(device: torch.device | str, field: str = "device") -> None:
    """Check that torch can use a device.

    Raises:
        UserError: it cannot; the message names the field that asks for the device.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # unknown, or torch is built without it
        reason = str(error).splitlines()[0]
        raise UserError(f"{field}={str(device)!r}: torch cannot use it ({reason})") from error


def require_memory(n_bytes: int, device: torch.device | str, field: str, value: object) -> None:
    """Check that `n_bytes` are free on a device; other devices than CPU and CUDA are not checked.

    Raises:
        UserError: they are not; the message names the field that asks for them.
    """
    free = free_memory(device)
    if free is not None and n_bytes > free:
        raise UserError(
            f"{field}={value}: would take {n_bytes / 1e9:.1f} GB on {device}, where "
            f"{free / 1e9:.1f} GB are free; lower it"
        )


def free_memory(device: torch.device | str) -> int | None:
    """Bytes that are free on a device; None for other devices than CPU and CUDA."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available if device.type == "cpu" else None
