"""One Triton program: the few words of a step are there sooner than a copy engine has begun."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel


def copy_words(source_RW: torch.Tensor, target_RW: torch.Tensor) -> None:
    """See the contract."""
    from lockstep.ops.copy_words.programs import copy

    copy(source_RW, target_RW)


KERNELS = (
    Kernel(
        op="copy_words",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=copy_words,
        platforms=frozenset({"cuda", "rocm"}),
        features=frozenset({"triton"}),
    ),
)
