"""The memory of a checked call: where its arguments lie, what lies around them, and who wrote where."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lockstep.ops.contract import Argument
from lockstep.ops.nested import tensors_in, with_tensors

_GUARD_BYTES = 256
"""Poison before and after each storage; a multiple of every alignment that kernels ask for."""
_LARGEST_ITEM_BYTES = 16


class CallMemory:
    """The storages behind a case's arguments, byte by byte; every call gets a copy of its own.

    Tensors that share a storage share its copy, with the same offsets and strides. Bytes that belong to no tensor, and
    those before and after a storage, are poison. Records and tuples (a weight in parts, a decoder) are walked.
    """

    def __init__(self, arguments: Sequence[Argument], made: Sequence[Any]) -> None:
        self._made = list(made)
        self._storages: dict[int, _Storage] = {}
        for spec, value in zip(arguments, self._made, strict=False):
            for tensor in tensors_in(value):
                if _key(tensor) not in self._storages:
                    self._storages[_key(tensor)] = _Storage.of(tensor)
                self._storages[_key(tensor)].hold(spec.name, tensor, may_change=spec.written or spec.scratch)

    def place(self, device: torch.device | str) -> PlacedCall:
        """Fresh arguments on the device, as the case made them."""
        copies = {key: storage.image.to(device, copy=True) for key, storage in self._storages.items()}

        def view(tensor: torch.Tensor) -> torch.Tensor:
            offset = _GUARD_BYTES // tensor.element_size() + tensor.storage_offset()
            copy = copies[_key(tensor)].view(tensor.dtype)
            return copy.as_strided(tensor.shape, tensor.stride(), offset)

        pairs = [(storage, copies[key]) for key, storage in self._storages.items()]
        return PlacedCall([with_tensors(value, view) for value in self._made], pairs)


@dataclass(frozen=True, slots=True)
class PlacedCall:
    """One call's arguments, and the copies of the storages that they lie in."""

    arguments: list[Any]
    _copies: list[tuple[_Storage, torch.Tensor]]

    def changes(self) -> Iterator[str]:
        """In words, every argument that the contract does not give away and memory around arguments, if it changed."""
        for storage, copy in self._copies:
            yield from storage.changes(copy.cpu())


@dataclass(frozen=True, slots=True)
class _Storage:
    """`image` [byte] is what a call finds; `holders` are names of arguments with the bytes that are theirs."""

    image: torch.Tensor
    may_change: torch.Tensor
    holders: list[tuple[str, torch.Tensor]] = field(default_factory=list)

    @staticmethod
    def of(tensor: torch.Tensor) -> _Storage:
        """Poison as `tensor` would read it, of the size of its storage and the guards."""
        num_bytes = math.ceil(tensor.untyped_storage().nbytes() / _LARGEST_ITEM_BYTES) * _LARGEST_ITEM_BYTES
        num_bytes += 2 * _GUARD_BYTES
        image = poison(torch.empty(num_bytes // tensor.element_size(), dtype=tensor.dtype))
        return _Storage(image.view(torch.uint8), torch.zeros(num_bytes, dtype=torch.bool))

    def hold(self, name: str, tensor: torch.Tensor, *, may_change: bool) -> None:
        """Takes over the tensor's values."""
        held = torch.zeros_like(self.may_change)
        size = tensor.element_size()
        # Elements of an expanded dim are one element.
        shape = [
            1 if stride == 0 else length for length, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ]
        if tensor.numel():
            strides = (*(stride * size for stride in tensor.stride()), 1)
            held.as_strided((*shape, size), strides, _GUARD_BYTES + tensor.storage_offset() * size).fill_(True)
        found = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        inside = slice(_GUARD_BYTES, _GUARD_BYTES + len(found))
        self.image[inside] = torch.where(held[inside], found, self.image[inside])
        if may_change:
            self.may_change.logical_or_(held)
        self.holders.append((name, held))

    def changes(self, after: torch.Tensor) -> Iterator[str]:
        """What of it differs and may not."""
        if torch.equal(after, self.image):
            return
        changed = (after != self.image) & ~self.may_change
        if not bool(changed.any()):
            return
        for name, held in self.holders:
            if bool((changed & held).any()):
                yield f"argument {name} was changed"
            changed &= ~held
        if bool(changed.any()):
            yield f"memory around {' and '.join(dict.fromkeys(name for name, _ in self.holders))} was written"


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, filled with NaN or the largest integer."""
    if tensor.is_floating_point():
        return tensor.fill_(math.nan)
    return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


def is_poison(tensor: torch.Tensor) -> bool:
    """Whether nobody wrote to a tensor since it was poisoned."""
    on_host = tensor.cpu()
    if on_host.is_floating_point():
        return bool(on_host.double().isnan().all())
    return torch.equal(on_host, poison(torch.empty_like(on_host)))


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
