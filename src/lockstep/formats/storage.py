"""What tensors look like on disk: the block tables of ggml, the dtypes of safetensors, extents in a file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lockstep.core.errors import ModelFileError


class BlockLayout(NamedTuple):
    """`num_elements` neighbours of a row are stored together in `num_bytes`."""

    num_elements: int
    num_bytes: int


# ggml.h, enum ggml_type, and the block structs of ggml-common.h.
GGML_TYPE_NAMES: dict[int, str] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    30: "BF16",
}

# Named only so that a refusal can say what the file holds.
OTHER_GGML_TYPE_NAMES: dict[int, str] = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}

BLOCK_LAYOUTS: dict[str, BlockLayout] = {
    "F32": BlockLayout(1, 4),
    "F16": BlockLayout(1, 2),
    "BF16": BlockLayout(1, 2),
    "Q4_0": BlockLayout(32, 18),
    "Q4_1": BlockLayout(32, 20),
    "Q5_0": BlockLayout(32, 22),
    "Q5_1": BlockLayout(32, 24),
    "Q8_0": BlockLayout(32, 34),
    "Q4_K": BlockLayout(256, 144),
    "Q5_K": BlockLayout(256, 176),
    "Q6_K": BlockLayout(256, 210),
}

WIDENED_BLOCK_BYTES: dict[str, int] = {"Q4_K": 160, "Q5_0": 34, "Q5_1": 36, "Q5_K": 288, "Q6_K": 288}
"""What a block takes in the memory of kernels that read it, where that is more than in the file: integers of 5 and 6
bits in 8, scales and minima of groups in float16."""

# https://github.com/huggingface/safetensors#format; bits, because the newest ones are narrower than a byte.
SAFETENSORS_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


class StoredTensor(NamedTuple):
    """One entry of a container's header: `shape` in torch order, `offset` from the start of the file."""

    name: str
    storage_type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def file_size(path: Path) -> int:
    """Size of a file in bytes. Raises ModelFileError when it cannot be read."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> ModelFileError:
    """The refusal for a file that the system will not let us read."""
    return ModelFileError(f"{path}: cannot be read ({error.strerror or error})")


def check_extents(path: Path, tensors: Iterable[StoredTensor], data_start: int, file_bytes: int) -> None:
    """Raises ModelFileError unless every tensor lies inside the file's data and none overlaps another."""
    end, previous = data_start, "the header"
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset < end:
            raise ModelFileError(f"{path}: tensor {tensor.name!r} overlaps {previous}; the file is corrupt")
        end, previous = tensor.offset + tensor.nbytes, repr(tensor.name)
        if end > file_bytes:
            raise ModelFileError(
                f"{path}: tensor {tensor.name!r} ends at byte {end} but the file has {file_bytes}; "
                "it is truncated or corrupt, fetch it again"
            )
