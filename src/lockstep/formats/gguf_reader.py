"""The GGUF container: little-endian versions 2 and 3, header only.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Nothing is allocated on the word of the file:
every count is held against the bytes that are left before it is believed.
"""

from __future__ import annotations

import mmap
import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from lockstep.core.errors import ModelFileError
from lockstep.formats.storage import (
    BLOCK_LAYOUTS,
    GGML_TYPE_NAMES,
    OTHER_GGML_TYPE_NAMES,
    StoredTensor,
    check_extents,
    file_size,
    unreadable,
)

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_HEADER_BYTES = 24
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20
_MAX_DIMS = 4
_MAX_NESTING = 4
_MAX_ARRAY = 1 << 22
_MAX_KEY_BYTES = 65535
_MAX_NAME_BYTES = 256
_MIN_PAIR_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8

_SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_U64 = struct.Struct("<Q")


class GgufHeader(NamedTuple):
    """The key-value table, and the tensors in file order."""

    metadata: dict[str, Any]
    tensors: list[StoredTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Reads everything before the tensor data and checks that the data is all there.

    Raises ModelFileError naming the file and what is wrong with it.
    """
    file_bytes = file_size(path)
    if file_bytes < _HEADER_BYTES:
        raise ModelFileError(f"{path}: {file_bytes} bytes is too short for a GGUF file; fetch it again")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Cursor(path, data))
    except OSError as error:
        raise unreadable(path, error) from error


def read_f32(path: Path, tensor: StoredTensor) -> tuple[float, ...]:
    """The values of a small F32 tensor, flattened. Raises ModelFileError when the file cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(tensor.offset)
            return struct.unpack(f"<{tensor.nbytes // 4}f", file.read(tensor.nbytes))
    except OSError as error:
        raise unreadable(path, error) from error


class _Cursor:
    """Reads a GGUF header value by value, never past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.at = 0
        self.end = len(data)
        self._data = data

    def fail(self, problem: str) -> NoReturn:
        raise ModelFileError(f"{self.path}: {problem}; the file is corrupt, fetch it again")

    def require(self, num_bytes: int, what: str) -> None:
        if num_bytes > self.end - self.at:
            self.fail(f"{what} at byte {self.at} cannot fit in the {self.end - self.at} bytes that are left")

    def raw(self, num_bytes: int, what: str) -> bytes:
        self.require(num_bytes, what)
        start, self.at = self.at, self.at + num_bytes
        return self._data[start : self.at]

    def scalars(self, value_type: int, count: int) -> list[Any]:
        layout = _SCALAR_FORMATS.get(value_type)
        if layout is None:
            self.fail(f"value type {value_type} before byte {self.at} is unknown")
        num_bytes = count * struct.calcsize(layout)
        values = struct.unpack(f"<{count}{layout}", self.raw(num_bytes, f"{count} values"))
        return [bool(value) for value in values] if value_type == _BOOL else list(values)

    def u32(self) -> int:
        return int.from_bytes(self.raw(4, "a 32-bit number"), "little")

    def u64(self) -> int:
        return int.from_bytes(self.raw(8, "a 64-bit number"), "little")

    def strings(self, count: int) -> list[str]:
        """The hot loop: a vocabulary has up to a million strings."""
        self.require(count * _U64.size, f"{count} strings")
        data, at, end, unpack = self._data, self.at, self.end, _U64.unpack_from
        found = []
        try:
            for _ in range(count):
                start = at + 8
                at = start + unpack(data, at)[0]
                if at > end:
                    self.fail(f"a string at byte {start} runs past the end")
                found.append(str(data[start:at], "utf-8"))
        except (struct.error, UnicodeDecodeError):
            self.fail(f"a string before byte {at} is cut off or not UTF-8")
        self.at = at
        return found

    def string(self) -> str:
        return self.strings(1)[0]

    def name(self, max_bytes: int) -> str:
        """A string that will appear in messages, so its length is bounded."""
        self.require(_U64.size, "a name")
        length = _U64.unpack_from(self._data, self.at)[0]
        if length > max_bytes:
            self.fail(f"the name at byte {self.at} would have {length} bytes, more than {max_bytes}")
        return self.string()

    def value(self, value_type: int, depth: int = 0) -> Any:
        if value_type == _STRING:
            return self.string()
        if value_type != _ARRAY:
            return self.scalars(value_type, 1)[0]
        if depth == _MAX_NESTING:
            self.fail(f"arrays are nested deeper than {_MAX_NESTING} before byte {self.at}")
        element_type, count = self.u32(), self.u64()
        if count > _MAX_ARRAY:
            self.fail(f"an array before byte {self.at} has {count} elements, more than {_MAX_ARRAY}")
        if element_type == _STRING:
            return self.strings(count)
        if element_type != _ARRAY:
            return self.scalars(element_type, count)
        self.require(count * (4 + 8), f"{count} arrays")
        return [self.value(_ARRAY, depth + 1) for _ in range(count)]


def _parse(cursor: _Cursor) -> GgufHeader:
    magic = cursor.raw(len(MAGIC), "the magic")
    if magic != MAGIC:
        raise ModelFileError(f"{cursor.path}: not a GGUF file, it starts with {magic!r} instead of {MAGIC!r}")
    _check_version(cursor.path, cursor.u32())
    num_tensors, num_pairs = cursor.u64(), cursor.u64()
    metadata = _read_metadata(cursor, num_pairs)
    cursor.require(num_tensors * _MIN_TENSOR_BYTES, f"{num_tensors} tensors")
    entries = [_read_tensor(cursor) for _ in range(num_tensors)]
    alignment = _alignment(cursor, metadata)
    data_start = -(-cursor.at // alignment) * alignment
    for entry in entries:
        if entry.offset % alignment:
            cursor.fail(f"tensor {entry.name!r} is not aligned to {alignment} bytes")
    tensors = [entry._replace(offset=data_start + entry.offset) for entry in entries]
    check_extents(cursor.path, tensors, data_start, cursor.end)
    return GgufHeader(metadata, tensors)


def _check_version(path: Path, version: int) -> None:
    if version in _VERSIONS:
        return
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    found = "a big-endian file" if swapped in _VERSIONS else f"version {version}"
    raise ModelFileError(f"{path}: only little-endian GGUF of versions 2 and 3 can be read; this is {found}")


def _read_metadata(cursor: _Cursor, num_pairs: int) -> dict[str, Any]:
    cursor.require(num_pairs * _MIN_PAIR_BYTES, f"{num_pairs} metadata entries")
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        key = cursor.name(_MAX_KEY_BYTES)
        if key in metadata:
            cursor.fail(f"metadata key {key!r:.80} appears twice")
        metadata[key] = cursor.value(cursor.u32())
    return metadata


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is int and 0 < alignment <= _MAX_ALIGNMENT and alignment & (alignment - 1) == 0:
        return alignment
    cursor.fail(f"general.alignment is {alignment!r}, not a power of two up to {_MAX_ALIGNMENT}")


def _read_tensor(cursor: _Cursor) -> StoredTensor:
    """One tensor entry; its offset still counts from the start of the data."""
    name = cursor.name(_MAX_NAME_BYTES)
    num_dims = cursor.u32()
    if not 1 <= num_dims <= _MAX_DIMS:
        cursor.fail(f"tensor {name!r} has {num_dims} dims, expected 1 to {_MAX_DIMS}")
    shape = tuple(reversed(cursor.scalars(10, num_dims)))
    type_id, offset = cursor.u32(), cursor.u64()
    storage_type = GGML_TYPE_NAMES.get(type_id)
    if storage_type is None:
        known = ", ".join(GGML_TYPE_NAMES.values())
        found = OTHER_GGML_TYPE_NAMES.get(type_id, f"unknown type {type_id}")
        raise ModelFileError(
            f"{cursor.path}: tensor {name!r} is stored as {found}, which is not supported, only {known}"
        )
    layout = BLOCK_LAYOUTS[storage_type]
    is_cut_block = shape[-1] % layout.num_elements != 0 or (num_dims == 1 and layout.num_elements > 1)
    if not all(shape) or is_cut_block:
        cursor.fail(f"tensor {name!r} of shape {shape} cannot be stored as {storage_type}")
    nbytes = prod(shape) // layout.num_elements * layout.num_bytes
    return StoredTensor(name, storage_type, shape, offset, nbytes)
