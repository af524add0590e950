"""Every operator of the simulated device: run on the host, over the same memory.

Torch decomposes what it can before it reaches a device. What is left are views, which must share storage; writes,
whose results are the tensors that were passed in; copies between devices; and everything else, whose results are new.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from lockstep.platforms.sim.host_memory import as_host, as_simulated

DEVICE_TYPE = "sim"


def run_on_host(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Calls `op` on the host and gives its results back as the simulated device's."""
    schema = op._schema
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    on_host = {name: _to_host(value) for name, value in given.items()}
    for argument in schema.arguments:
        value: Any = given.get(argument.name)
        if argument.is_out and value.numel() == 0:
            # An empty `out` may grow; memory that is only seen through a header cannot.
            on_host[argument.name] = torch.empty(0, dtype=value.dtype)
        elif isinstance(value, (bool, int, float)) and isinstance(argument.type, torch.TensorType):
            on_host[argument.name] = _as_scalar(value, given.values())
    results = op(**on_host)
    if len(schema.returns) == 0:
        return None
    if len(schema.returns) == 1:
        return _given_back(schema, schema.returns[0], given, on_host, results)
    pairs = zip(schema.returns, results, strict=True)
    return tuple(_given_back(schema, returned, given, on_host, result) for returned, result in pairs)


def as_strided(
    tensor: torch.Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> torch.Tensor:
    """A view over the same storage, which is what makes it a view to torch."""
    view: torch.Tensor = torch.ops.aten.alias(tensor)
    return view.as_strided_(size, stride, storage_offset)


def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Copies values where one of the two tensors is simulated, or both."""
    _to_host(target).copy_(_to_host(source))
    return target


def resize_(
    tensor: torch.Tensor, size: Sequence[int], *, memory_format: torch.memory_format | None = None
) -> torch.Tensor:
    """Gives `tensor` new memory of another size, the first values kept. Views of it stay what they were."""
    grown = torch.empty(size, dtype=tensor.dtype)
    kept = min(grown.numel(), tensor.numel())
    grown.flatten()[:kept].copy_(as_host(tensor).flatten()[:kept])
    tensor.data = as_simulated(grown)
    return tensor


class PinMemory:
    """pin_memory of host tensors. Torch offers it to devices written in C++ alone, and asks the newest device first.

    Memory of the host is all that the simulated device reads, so there a copy is as good as pinned; for any other
    device torch's own function is called.
    """

    def __init__(self) -> None:
        self._torchs_own = torch.library.get_kernel("aten::_pin_memory", "CPU")

    def __call__(
        self, keys: torch._C.DispatchKeySet, tensor: torch.Tensor, device: torch.device | None = None
    ) -> torch.Tensor:
        if device is None or device.type == DEVICE_TYPE:
            return tensor.clone()
        pinned: torch.Tensor = self._torchs_own.call_boxed(keys, tensor, device)
        return pinned


def _given_back(
    schema: torch.FunctionSchema,
    returned: torch.Argument,
    given: dict[str, Any],
    on_host: dict[str, Any],
    result: Any,
) -> Any:
    """The result as the caller must see it: a new tensor, an argument that was written, or a view of one."""
    if returned.alias_info is None:
        return _to_simulated(result)
    owner = next(
        argument.name
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.before_set == returned.alias_info.before_set
    )
    tensor: torch.Tensor = given[owner]
    if returned.alias_info.is_write:
        if result.shape != tensor.shape:
            tensor.data = as_simulated(result)
        return tensor
    distance = (result.data_ptr() - on_host[owner].data_ptr()) // result.itemsize if result.numel() else 0
    return as_strided(tensor, result.shape, result.stride(), int(tensor.storage_offset()) + distance)


def _as_scalar(number: bool | int | float, beside: Iterable[Any]) -> torch.Tensor:
    """What torch makes of a plain number in a tensor's place: all its digits, and no say in the result's dtype."""
    floating = any(isinstance(value, torch.Tensor) and value.is_floating_point() for value in beside)
    return torch.tensor(number, dtype=torch.float64 if isinstance(number, float) and floating else None)


def _to_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return as_host(value) if value.device.type == DEVICE_TYPE else value
    if isinstance(value, (list, tuple)):
        return [_to_host(item) for item in value]
    if isinstance(value, torch.device) and value.type == DEVICE_TYPE:
        return torch.device("cpu")
    return value


def _to_simulated(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return as_simulated(value)
    if isinstance(value, (list, tuple)):
        return [_to_simulated(item) for item in value]
    return value
