"""bfloat16 products of the native extension, with float32 sums: the weight packed once."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Signature
from lockstep.ops.native import native_kernels, pack, take_rows
from lockstep.ops.native_product import native_product


def _refuses(signature: Signature) -> str | None:
    dtype = signature["dtype"]
    return None if dtype == torch.bfloat16 else f"packs bfloat16 weights, not {dtype}"


KERNELS = native_kernels(
    "linear",
    native_product,
    refuses=_refuses,
    prepare=lambda weight, instruction_set: pack(weight),
    take_rows=take_rows,
)
