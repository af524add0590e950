"""Two Triton programs: the best of each tile, then of each row."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel


def argmax(logits_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract."""
    from lockstep.ops.argmax.programs import search

    return search(logits_RV)


KERNELS = (
    Kernel(
        op="argmax",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=argmax,
        platforms=frozenset({"cuda", "rocm", "musa"}),
        features=frozenset({"triton"}),
    ),
)
