"""Integer products of the native extension: the weight packed once, activations rounded to 8 bits by blocks of 32."""

from __future__ import annotations

from lockstep.ops.contract import Signature
from lockstep.ops.native import native_kernels, pack, take_rows
from lockstep.ops.native_product import native_product

_BITS = (4, 8)
_GROUP_INPUTS = (16, 32)


def _refuses(signature: Signature) -> str | None:
    if signature["bits"] not in _BITS:
        return f"packs integers of 4 or 8 bits, not {signature['bits']}"
    if signature["group_inputs"] not in _GROUP_INPUTS:
        return f"reads scales of 16 or 32 inputs, not {signature['group_inputs']}"
    return None


KERNELS = native_kernels(
    "quant_linear",
    native_product,
    refuses=_refuses,
    prepare=lambda weight, instruction_set: pack(weight),
    take_rows=take_rows,
)
