"""GPUs that are not there: tensors with real values that insist on the device they claim to be on.

PyTorch's fake tensors refuse to mix devices too, but have no values, so nothing that depends on a
value (which tokens a block has) can run on them. A `PlacedTensor` holds its values in an ordinary
CPU tensor and reports a device such as meta:1, a name that needs no driver. Within
`pretend_gpus() as waits`

- an operation on tensors of two devices raises, as on GPUs; a number on the CPU may take part;
- `.to`, `copy_` and factory functions with a `device` move between the devices;
- every operation for which a GPU would make the host wait is recorded in `waits`: values or sizes
  that the host reads, selections by a mask, copies between the CPU and a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

CPU = torch.device("cpu")
ACCELERATOR = "meta"
"""A type of device that PyTorch knows and needs no driver to name."""
READS = {
    "_local_scalar_dense",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "_unique2",
}
"""Operations whose result, or its size, the host has to know."""


class PlacedTensor(Tensor):
    """Values on the CPU, and the GPU that they are meant to be on."""

    values: Tensor  # type: ignore[assignment]
    place: torch.device

    @staticmethod
    def __new__(cls, values: Tensor, place: torch.device) -> PlacedTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device(ACCELERATOR),  # which autograd takes for a device without streams
            dispatch_device=True,
            requires_grad=values.requires_grad,
        )
        made.values, made.place = values.detach(), place
        return made

    @classmethod
    def __torch_dispatch__(
        cls, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(op, args, kwargs or {}, Counter())

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PlacedTensor({self.values}, {self.place})"


def placed(x: Tensor, place: str) -> Tensor:
    """A tensor with the values of `x` on a GPU that is not there."""
    values = x.values if isinstance(x, PlacedTensor) else x.detach()
    return PlacedTensor(values.clone(), torch.device(place)).requires_grad_(x.requires_grad)


def place_module(module: nn.Module, place: str) -> None:
    """Move all parameters and buffers of a module, in place; `Module.to` cannot change classes."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                moved = placed(parameter.detach(), place)
                owner._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = placed(buffer, place)


@contextmanager
def pretend_gpus() -> Iterator[Counter[str]]:
    """Within the block tensors are made on GPUs; yields what a host would wait for."""
    waits: Counter[str] = Counter()
    with _FromTheHost(), _OnGPUs(waits):
        yield waits


class _OnGPUs(TorchDispatchMode):
    """Sees every operation, those that create tensors included."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(op, args, kwargs or {}, self.waits)


class _FromTheHost(TorchFunctionMode):
    """Numbers from Python are copied to the device: PyTorch does that where no operation shows."""

    def __torch_function__(
        self, f: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if f is Tensor.new_tensor:
            made = torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype))
            return made.to(kwargs.get("device", args[0].device))
        if f is torch.tensor and torch.device(kwargs.get("device") or CPU).type == ACCELERATOR:
            device = kwargs.pop("device")
            return torch.tensor(*args, **kwargs).to(device)
        return f(*args, **kwargs)


def _run(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], waits: Counter[str]) -> Any:
    name = op.overloadpacket._qualified_op_name.split("::")[-1]
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    if name == "device":
        return _place(tensors[0])
    assert all(_has_values(x) for x in tensors), f"{name}: a tensor was made without its values"
    target = kwargs.get("device")
    target = None if target is None else torch.device(target)
    places = {_place(x) for x in tensors}
    gpus = {place for place in places if place.type == ACCELERATOR}
    if name in ("_to_copy", "copy_"):
        source = _place(tensors[-1])
        here = target or _place(tensors[0])
        if {source.type, here.type} == {"cpu", ACCELERATOR}:
            waits[f"{name} {source.type} to {here.type}"] += 1
    else:
        _require_one_device(name, tensors)
        here = target or next(iter(gpus), CPU)
        if gpus and (name in READS or _selects_by_mask(name, args)):
            waits[name] += 1
    if here == CPU and not gpus:
        return op(*args, **kwargs)
    unwrapped_args, unwrapped_kwargs = tree_map_only(
        PlacedTensor, lambda x: x.values, (args, kwargs)
    )
    if target is not None:
        unwrapped_kwargs = {**unwrapped_kwargs, "device": CPU}
    result = op(*unwrapped_args, **unwrapped_kwargs)
    if here == CPU:
        return result
    written = {id(x.values): x for x in tensors if isinstance(x, PlacedTensor)}
    # an operation in place returns what it wrote to
    return tree_map_only(
        Tensor, lambda x: written[id(x)] if id(x) in written else PlacedTensor(x, here), result
    )


def _place(x: Tensor) -> torch.device:
    return x.place if isinstance(x, PlacedTensor) else CPU


def _has_values(x: Tensor) -> bool:
    return isinstance(x, PlacedTensor) or not x.is_meta


def _require_one_device(name: str, tensors: list[Tensor]) -> None:
    """Raise as PyTorch does; a tensor of one number on the CPU may be used anywhere."""
    gpus = {x.place for x in tensors if isinstance(x, PlacedTensor)}
    on_cpu = any(not isinstance(x, PlacedTensor) and x.ndim > 0 for x in tensors)
    if len(gpus) > 1 or (gpus and on_cpu):
        where = sorted({str(_place(x)) for x in tensors})
        raise RuntimeError(f"{name}: expected all tensors on the same device, found {where}")


def _selects_by_mask(name: str, args: tuple[Any, ...]) -> bool:
    if name != "index":
        return False
    return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
