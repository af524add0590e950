"""Reads tensors of an opened model by canonical name, only as many bytes as a slice needs.

Storage format and sharding are separate objects: a caller asks for a slice of a dim and never learns how it is
stored. Shape suffixes: R rows, B bytes of a row, C columns.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from lockstep.core.errors import ModelFileError, nearest
from lockstep.formats.model_files import ModelFiles, TensorInfo
from lockstep.formats.storage import unreadable
from lockstep.layers.build import Slice
from lockstep.quantization.storage_types import StorageType, storage_type


class PackedTensor(NamedTuple):
    """Rows as they are stored, uint8 [R, B], and what the bytes mean."""

    data: torch.Tensor
    storage: StorageType


class WeightSource(Protocol):
    """Tensors by canonical name, in Hugging Face's conventions."""

    def names(self) -> tuple[str, ...]:
        """Every stored tensor, in file order."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Where and how a tensor is stored. Raises ModelFileError when it is missing."""
        ...

    def load(
        self,
        name: str,
        dtype: torch.dtype,
        *,
        dim: int | None = None,
        start: int = 0,
        length: int | None = None,
        member: int | None = None,
    ) -> torch.Tensor:
        """The tensor, or `length` entries of `dim` from `start` on (to the end when None), as `dtype`.

        With `member` the tensor is that matrix of a stack of matrices, and no other one is read.
        Contiguous. May share memory with the file: copy it before writing to it. Raises ModelFileError when the
        tensor is missing, cannot be read or the slice lies outside of it.
        """
        ...

    def raw(
        self, name: str, *, dim: int | None = None, start: int = 0, length: int | None = None
    ) -> PackedTensor:
        """The same slice in packed form, rows in Hugging Face's order; a slice of dim 1 is whole blocks."""
        ...

    def forget(self, name: str) -> None:
        """Says that what was read of a tensor is copied by now: its memory may be given back."""
        ...


class FileWeights:
    """The tensors of a model's files, mapped into memory when first asked for."""

    def __init__(self, files: ModelFiles) -> None:
        self._files = files
        self._maps: dict[Path, mmap.mmap] = {}

    def names(self) -> tuple[str, ...]:
        return tuple(self._files.tensors)

    def info(self, name: str) -> TensorInfo:
        info = self._files.tensors.get(name)
        if info is None:
            hint = nearest(name, self._files.tensors)
            raise ModelFileError(
                f"{self._files.path}: tensor {name!r} is missing{hint}; the model is incomplete"
            )
        return info

    def load(
        self,
        name: str,
        dtype: torch.dtype,
        *,
        dim: int | None = None,
        start: int = 0,
        length: int | None = None,
        member: int | None = None,
    ) -> torch.Tensor:
        info = self.info(name)
        part = Rectangle.of(info, dim, start, length, member)
        storage = storage_type_of(info)
        # Columns come in whole blocks, so take those that cover the part, then cut it out of the values.
        first = part.first_column // storage.block_elements * storage.block_elements
        last = -(-part.last_column // storage.block_elements) * storage.block_elements
        covering_RB = self._rows(info, storage, part._replace(first_column=first, last_column=last))
        exact_dtype = torch.float32 if info.stored_offset else dtype
        values_RC = storage.dequantise(covering_RB, exact_dtype)
        values_RC = values_RC[:, part.first_column - first : part.last_column - first]
        if info.stored_offset:
            values_RC = (values_RC - info.stored_offset).to(dtype)
        return values_RC.reshape(part.shape).contiguous()

    def raw(
        self, name: str, *, dim: int | None = None, start: int = 0, length: int | None = None
    ) -> PackedTensor:
        info = self.info(name)
        if info.stored_offset:
            raise ModelFileError(
                f"{info.file}: {name!r} is stored with {info.stored_offset:g} added; use load()"
            )
        storage = storage_type_of(info)
        part = Rectangle.of(info, dim, start, length)
        return PackedTensor(self._rows(info, storage, part), storage)

    def forget(self, name: str) -> None:
        """Gives back the memory of a tensor's part of its file: read pages count as the process's own until then.

        Views stay valid and are read from the file again.
        """
        info = self.info(name)
        first = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (info.offset + info.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self._map(info.file).madvise(mmap.MADV_DONTNEED, first, last - first)

    def _rows(self, info: TensorInfo, storage: StorageType, part: Rectangle) -> torch.Tensor:
        """The packed bytes of a part, a view of the file where the rows are stored in order."""
        num_rows, num_columns = matrix_shape(info.shape)
        rows_RB = self._bytes(info).view(num_rows, storage.row_bytes(num_columns))
        first_byte, last_byte = storage.row_bytes(part.first_column), storage.row_bytes(part.last_column)
        columns_RB = rows_RB[:, first_byte:last_byte]
        if not info.interleaved_head_dim:
            return columns_RB[part.first_row : part.last_row]
        wanted_R = torch.arange(part.first_row, part.last_row)
        return columns_RB.index_select(0, _interleaved_row(wanted_R, info.interleaved_head_dim))

    def _bytes(self, info: TensorInfo) -> torch.Tensor:
        if info.nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        data = torch.frombuffer(self._map(info.file), dtype=torch.uint8, count=info.nbytes, offset=info.offset)
        # A float view needs an aligned address, which a container need not give.
        return data if info.offset % 8 == 0 else data.clone()

    def _map(self, file: Path) -> mmap.mmap:
        """The file in memory, private to this process: nothing written to a tensor reaches the disk."""
        mapped = self._maps.get(file)
        if mapped is None:
            try:
                with file.open("rb") as opened:
                    mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            except OSError as error:
                raise unreadable(file, error) from error
            self._maps[file] = mapped
        return mapped


def storage_type_of(info: TensorInfo) -> StorageType:
    """The storage record of a tensor. Raises ModelFileError naming the tensor if its type is not supported."""
    try:
        return storage_type(info.storage_type)
    except ModelFileError as error:
        raise ModelFileError(f"{info.file}: tensor {info.name!r}: {error}") from error


def stays_grouped(info: TensorInfo, part: Slice | None) -> bool:
    """True when a matrix, or this part of it, is whole blocks of integers that need no change of values."""
    storage = storage_type_of(info)
    if not storage.is_packed or len(info.shape) != 2 or info.stored_offset:
        return False
    cut = (part.start, part.length) if part is not None and part.dim == 1 else (0, info.shape[1])
    return all(size % storage.block_elements == 0 for size in cut)


class Rectangle(NamedTuple):
    """A part of a tensor seen as a matrix, and the shape that it has as a tensor."""

    shape: tuple[int, ...]
    first_row: int
    last_row: int
    first_column: int
    last_column: int

    @classmethod
    def of(
        cls, info: TensorInfo, dim: int | None, start: int, length: int | None, member: int | None = None
    ) -> Rectangle:
        """That part of the tensor. Raises ModelFileError when there is none such."""
        whole, before = info.shape, 0
        if member is not None:
            if len(whole) != 3 or not 0 <= member < whole[0]:
                raise ModelFileError(f"{info.name!r} of shape {whole} has no matrix {member}")
            whole, before = whole[1:], member * whole[1]
        num_rows, num_columns = matrix_shape(whole)
        if dim is None:
            if start or length is not None:
                raise ModelFileError(f"{info.name!r}: a slice needs its dim")
            return cls(whole, before, before + num_rows, 0, num_columns)
        if dim not in range(min(2, len(whole))) or (dim == 1 and len(whole) != 2):
            raise ModelFileError(f"{info.name!r} of shape {info.shape} cannot be sliced along dim {dim}")
        stop = whole[dim] if length is None else start + length
        if not 0 <= start < stop <= whole[dim]:
            raise ModelFileError(
                f"{info.name!r} of shape {whole} has no entries {start} to {stop} of dim {dim}"
            )
        shape = (*whole[:dim], stop - start, *whole[dim + 1 :])
        if dim == 1:
            return cls(shape, before, before + num_rows, start, stop)
        rows_of_each = num_rows // whole[0]
        return cls(shape, before + start * rows_of_each, before + stop * rows_of_each, 0, num_columns)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor in memory order; a vector is a column, so that its entries can be sliced."""
    if len(shape) < 2:
        return (shape[0] if shape else 1), 1
    num_columns = shape[-1]
    num_rows = 1
    for size in shape[:-1]:
        num_rows *= size
    return num_rows, num_columns


def _interleaved_row(row_R: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Where GGUF keeps the given rows of Hugging Face's order: row i of half h of a head is its row 2 i + h."""
    head_R, within_R = row_R // head_dim, row_R % head_dim
    half_R, index_R = within_R // (head_dim // 2), within_R % (head_dim // 2)
    return head_R * head_dim + 2 * index_R + half_R
