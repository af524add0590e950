"""How `--quantization` holds matrices that a file keeps as plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from lockstep.ops.grouped_weight import GroupedWeight
from lockstep.quantization.quantise import quantise
from lockstep.quantization.storage_types import storage_type


def grouped(values_OI: torch.Tensor, name: str) -> GroupedWeight:
    """float32 values as the named block format would store them, in unsigned integers. Raises as `quantise` does."""
    storage = storage_type(name.upper())
    if values_OI.is_meta:
        num_rows, num_columns = values_OI.shape
        return storage.grouped(
            torch.empty(num_rows, storage.row_bytes(num_columns), dtype=torch.uint8, device="meta")
        )
    q_OI, scale_OG, minimum_OG = quantise(values_OI, name)
    return GroupedWeight(
        q_OI.view(torch.uint8) + storage.zero, scale_OG, minimum_OG, storage.zero, storage.bits
    )


QUANTISERS: Mapping[str, Callable[[torch.Tensor], GroupedWeight]] = {
    "q4_0": partial(grouped, name="q4_0"),
    "q8_0": partial(grouped, name="q8_0"),
    "int8": partial(grouped, name="q8_0"),
}
"""By the option's value; what is not here holds values as they are."""
