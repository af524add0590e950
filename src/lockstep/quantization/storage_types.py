"""Storage types: one record each, and the two things that can be done with packed bytes.

Shape suffixes: R rows, B bytes of a row, C columns (elements of a row), G groups of a row, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lockstep.core.errors import ModelFileError, nearest
from lockstep.formats.storage import BLOCK_LAYOUTS
from lockstep.ops.grouped_weight import GroupedWeight
from lockstep.quantization import ggml_blocks
from lockstep.quantization.ggml_blocks import Groups

# Elements decoded at a time: the temporaries of one piece stay in a core's cache.
_PIECE_ELEMENTS = 1 << 17


@dataclass(frozen=True, slots=True)
class StorageType:
    """How a row of values becomes bytes: blocks of `block_elements` neighbours in `block_bytes` bytes.

    Exactly one of `dtype` (plain floating point) and `take_apart` (blocks [N, block_bytes] -> Groups) is set. Packed
    integers plus `zero` lie below 2^bits.
    """

    name: str
    block_elements: int
    block_bytes: int
    dtype: torch.dtype | None = None
    take_apart: Callable[[torch.Tensor], Groups] | None = None
    bits: int = 8
    zero: int = 0

    @property
    def is_packed(self) -> bool:
        """True when values share blocks with scales, false for plain floats."""
        return self.take_apart is not None

    def row_bytes(self, num_columns: int) -> int:
        """Bytes of one row. Raises ModelFileError if the row is not made of whole blocks."""
        if num_columns % self.block_elements:
            raise ModelFileError(
                f"{num_columns} columns are not whole {self.name} blocks of {self.block_elements}"
            )
        return num_columns // self.block_elements * self.block_bytes

    def num_columns(self, num_row_bytes: int) -> int:
        """Elements in a row of so many bytes. Raises ModelFileError if the row is not made of whole blocks."""
        if num_row_bytes % self.block_bytes:
            raise ModelFileError(
                f"{num_row_bytes} bytes are not whole {self.name} blocks of {self.block_bytes}"
            )
        return num_row_bytes // self.block_bytes * self.block_elements

    def unpack(self, raw_RB: torch.Tensor) -> Groups:
        """Packed rows (uint8) as integers q [R, C] with scale and minimum [R, G]: value = q * scale + minimum.

        A group is C / G neighbours, 32 of them in most types. Raises ModelFileError for a type of plain floats.
        """
        if self.take_apart is None:
            raise ModelFileError(f"{self.name} holds plain values: there is nothing to unpack")
        num_rows = raw_RB.shape[0]
        self.num_columns(raw_RB.shape[1])
        q, scale, minimum = self.take_apart(raw_RB.reshape(-1, self.block_bytes))
        return Groups(
            q.reshape(num_rows, -1),
            scale.reshape(num_rows, -1),
            None if minimum is None else minimum.reshape(num_rows, -1),
        )

    def grouped(self, raw_RB: torch.Tensor) -> GroupedWeight:
        """Packed rows (uint8) as a constant weight [R, C] of unsigned integers. Raises ModelFileError as `unpack`."""
        q_RC, scale_RG, minimum_RG = self.unpack(raw_RB)
        if self.zero:
            # Adding in eight bits wraps around: the sum's bits are the unsigned number.
            q_RC = (q_RC.view(torch.uint8) + self.zero).contiguous()
        return GroupedWeight(q_RC.view(torch.uint8), scale_RG, minimum_RG, self.zero, self.bits)

    def dequantise(self, raw_RB: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Packed rows (uint8) as values [R, C]: computed in float32, then rounded once to `dtype`.

        A plain type already in `dtype` is returned as a view of the bytes.
        """
        num_columns = self.num_columns(raw_RB.shape[1])
        if self.dtype is not None:
            return raw_RB.view(self.dtype).to(dtype)
        values_RC = torch.empty(raw_RB.shape[0], num_columns, dtype=dtype, device=raw_RB.device)
        num_blocks = max(1, _PIECE_ELEMENTS // self.block_elements)
        raw_NB = raw_RB.reshape(-1, self.block_bytes)
        pieces = zip(
            raw_NB.split(num_blocks), values_RC.view(-1, self.block_elements).split(num_blocks), strict=True
        )
        for raw, values in pieces:
            values.copy_(self._decode(raw))
        return values_RC

    def _decode(self, raw_NB: torch.Tensor) -> torch.Tensor:
        assert self.take_apart is not None
        q, scale, minimum = self.take_apart(raw_NB)
        values = q.reshape(*scale.shape, -1).float().mul_(scale[..., None])
        if minimum is not None:
            values.add_(minimum[..., None])
        return values.view(-1, self.block_elements)


def _plain(name: str, dtype: torch.dtype) -> StorageType:
    return StorageType(name, *BLOCK_LAYOUTS[name], dtype=dtype)


def _blocks(
    name: str, take_apart: Callable[[torch.Tensor], Groups], *, bits: int = 8, zero: int = 0
) -> StorageType:
    return StorageType(name, *BLOCK_LAYOUTS[name], take_apart=take_apart, bits=bits, zero=zero)


STORAGE_TYPES: dict[str, StorageType] = {
    storage.name: storage
    for storage in (
        _plain("F32", torch.float32),
        _plain("F16", torch.float16),
        _plain("BF16", torch.bfloat16),
        _blocks("Q8_0", ggml_blocks.q8_0, zero=128),
        _blocks("Q4_0", ggml_blocks.q4_0, bits=4, zero=8),
        _blocks("Q4_1", ggml_blocks.q4_1, bits=4),
        _blocks("Q5_0", ggml_blocks.q5_0, zero=16),
        _blocks("Q5_1", ggml_blocks.q5_1),
        _blocks("Q4_K", ggml_blocks.q4_k, bits=4),
        _blocks("Q5_K", ggml_blocks.q5_k),
        _blocks("Q6_K", ggml_blocks.q6_k, zero=32),
    )
}


def storage_type(name: str) -> StorageType:
    """The record of a storage type. Raises ModelFileError naming the nearest one that is supported."""
    found = STORAGE_TYPES.get(name)
    if found is None:
        known = ", ".join(STORAGE_TYPES)
        raise ModelFileError(
            f"storage type {name!r} is not supported, only {known}{nearest(name, STORAGE_TYPES)}"
        )
    return found
