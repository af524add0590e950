"""Two launches of one small program for each expert. Waits for nothing, so it can be recorded in a graph."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel


def moe_align(
    ids_TK: torch.Tensor, num_experts: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the contract."""
    from lockstep.ops.moe_align.programs import align

    return align(ids_TK, num_experts, block_size)


KERNELS = (
    Kernel(
        op="moe_align",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=moe_align,
        platforms=frozenset({"cuda", "rocm", "musa"}),
        features=frozenset({"triton"}),
    ),
)
