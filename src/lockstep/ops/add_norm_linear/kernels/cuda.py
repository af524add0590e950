"""Our own kernel for Hopper behind the norm where it takes the rows; what Triton's does for all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from lockstep.ops.add_norm_linear.kernels.triton import add_norm_linear as triton_add_norm_linear
from lockstep.ops.add_norm_linear.kernels.triton import normalised
from lockstep.ops.add_norm_linear.kernels.triton import refuses as triton_refuses
from lockstep.ops.contract import Kernel, Signature
from lockstep.ops.linear.hopper_blocks import block_of


def _refuses(signature: Signature) -> str | None:
    reason = triton_refuses(signature)
    if reason is not None:
        return reason
    from lockstep.ops.cuda_program import missing_compiler

    return missing_compiler()


def add_norm_linear(
    update_TD: torch.Tensor | None,
    residual_TD: torch.Tensor,
    norm_weight_D: torch.Tensor,
    eps: float,
    weight_OD: torch.Tensor,
    bias_O: torch.Tensor | None = None,
    gated: bool = False,
    *,
    cache_dir: Path | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract. Compiled kernels are kept in `cache_dir`, if one is given."""
    block = block_of(residual_TD.shape[0], *weight_OD.shape, gated=gated)
    if block is not None:
        from lockstep.ops.linear.hopper import can_be_multiplied, hopper_product

        if can_be_multiplied(weight_OD, gated=gated):
            normed_TD, total_TD = normalised(update_TD, residual_TD, norm_weight_D, eps)
            return hopper_product(normed_TD, weight_OD, bias_O, block, cache_dir, gated=gated), total_TD
    return triton_add_norm_linear(update_TD, residual_TD, norm_weight_D, eps, weight_OD, bias_O, gated)


@cache
def _with_measured(cache_dir: Path) -> Callable[..., Any]:
    return partial(add_norm_linear, cache_dir=cache_dir)


def compile_later(
    signature: Signature, cache_dir: Path, device: torch.device
) -> Iterator[Callable[[], object]]:
    """The kernel of each number of rows that it takes."""
    from lockstep.ops.linear.hopper import programs

    return programs(signature, cache_dir, device, gated=signature["gated"])


KERNELS = (
    Kernel(
        op="add_norm_linear",
        provider="cuda",
        verified_on=("NVIDIA H100",),
        function=add_norm_linear,
        platforms=frozenset({"cuda"}),
        features=frozenset({"sm_90", "triton", "cuda_bindings"}),
        refuses=_refuses,
        with_measured=_with_measured,
        compile_later=compile_later,
    ),
)
