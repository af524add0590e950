"""One Triton program that reads the input once."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel, Signature
from lockstep.ops.per_token_group_quant_fp8.tiles import WIDEST_GROUP
from lockstep.ops.per_token_group_quant_int8.reference import INT8_MAX


def _refuses(signature: Signature) -> str | None:
    if signature["group"] > WIDEST_GROUP:
        return f"holds a group in registers: up to {WIDEST_GROUP} elements, not {signature['group']}"
    return None


def per_token_group_quant_int8(
    x_TD: torch.Tensor, group: int, column_major: bool, ue8m0: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract."""
    from lockstep.ops.per_token_group_quant_fp8.programs import quantise

    return quantise(x_TD, group, torch.int8, INT8_MAX, column_major=column_major, ue8m0=ue8m0)


KERNELS = (
    Kernel(
        op="per_token_group_quant_int8",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=per_token_group_quant_int8,
        platforms=frozenset({"cuda", "rocm", "musa"}),
        features=frozenset({"triton"}),
        refuses=_refuses,
    ),
)
