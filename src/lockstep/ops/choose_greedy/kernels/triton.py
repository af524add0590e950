"""Two Triton programs: the best of each tile as argmax finds it, then each row's, kept and packed."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel


def choose_greedy(logits_RV: torch.Tensor, owners_R: torch.Tensor, last_tokens_S: torch.Tensor) -> torch.Tensor:
    """See the contract."""
    from lockstep.ops.choose_greedy.programs import choose

    return choose(logits_RV, owners_R, last_tokens_S)


KERNELS = (
    Kernel(
        op="choose_greedy",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=choose_greedy,
        platforms=frozenset({"cuda", "rocm", "musa"}),
        features=frozenset({"triton"}),
    ),
)
