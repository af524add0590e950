"""The safetensors container, header only. Format: https://github.com/huggingface/safetensors#format."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from lockstep.core.errors import ModelFileError
from lockstep.formats.storage import SAFETENSORS_BITS, StoredTensor, check_extents, file_size, unreadable

_MAX_HEADER_BYTES = 100_000_000


def read_safetensors_header(path: Path) -> list[StoredTensor]:
    """The tensors of one file, in the order of its header, all of them checked to lie inside the file.

    Raises ModelFileError naming the file and what is wrong with it.
    """
    file_bytes = file_size(path)
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            data_start = 8 + header_bytes
            if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, file_bytes - 8):
                raise ModelFileError(
                    f"{path}: a header of {header_bytes} bytes in a file of {file_bytes} cannot be; "
                    "the file is truncated or no safetensors file, fetch it again"
                )
            text = file.read(header_bytes)
    except OSError as error:
        raise unreadable(path, error) from error
    tensors = [
        _entry(path, name, fields, data_start)
        for name, fields in _parse(path, text).items()
        if name != "__metadata__"
    ]
    check_extents(path, tensors, data_start, file_bytes)
    return tensors


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a name appears twice")
        return entries

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: the header is broken ({error}); fetch the file again") from error
    if not isinstance(header, dict):
        raise ModelFileError(f"{path}: the header is not a table of tensors; fetch the file again")
    return header


def _entry(path: Path, name: str, fields: Any, data_start: int) -> StoredTensor:
    try:
        storage_type, shape, (start, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        bits = SAFETENSORS_BITS[storage_type]
        numbers_are_sound = all(type(number) is int and number >= 0 for number in (start, end, *shape))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFileError(
            f"{path}: tensor {name!r:.80} has a broken entry ({error}); fetch it again"
        ) from error
    if not numbers_are_sound or prod(shape) * bits != (end - start) * 8:
        raise ModelFileError(
            f"{path}: tensor {name!r:.80} of type {storage_type} and shape {list(shape)} cannot lie in bytes "
            f"{start} to {end}; the file is corrupt, fetch it again"
        )
    return StoredTensor(name, storage_type, shape, data_start + start, end - start)
