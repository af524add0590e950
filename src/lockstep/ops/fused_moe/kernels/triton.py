"""Triton in one of three ways, by the number of tokens: pairs by themselves, tokens as rows, or groups of rows.

No launch waits for anything, so a graph can hold them all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from lockstep.ops.contract import Kernel


def fused_moe(
    hidden_TD: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    measured_in: Path | None = None,
) -> torch.Tensor:
    """See the contract."""
    from lockstep.ops.fused_moe.programs import mix_experts

    return mix_experts(hidden_TD, gate_up_E2FD, down_EDF, weights_TK, ids_TK, measured_in)


@cache
def _with_measured(cache_dir: Path) -> Callable[..., Any]:
    """One function for each folder: call sites that share it are the same kernel."""
    return partial(fused_moe, measured_in=cache_dir)


KERNELS = (
    Kernel(
        op="fused_moe",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=fused_moe,
        platforms=frozenset({"cuda", "rocm", "musa"}),
        features=frozenset({"triton"}),
        with_measured=_with_measured,
    ),
)
