"""Our own kernel for Hopper where tensor cores multiply few rows or some; what Triton's does for all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from lockstep.ops.contract import Kernel, Signature
from lockstep.ops.linear.hopper_blocks import block_of
from lockstep.ops.linear.kernels.triton import linear as triton_linear

_DTYPES = (torch.bfloat16, torch.float16)


def refuses(signature: Signature) -> str | None:
    """Why products of this dtype, or on this machine, are another kernel's; None where they are this one's."""
    dtype = signature["dtype"]
    if dtype not in _DTYPES:
        return f"multiplies bfloat16 and float16, not {dtype}"
    from lockstep.ops.cuda_program import missing_compiler

    return missing_compiler()


def linear(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None = None,
    *,
    cache_dir: Path | None = None,
) -> torch.Tensor:
    """See the contract. Compiled kernels are kept in `cache_dir`, if one is given."""
    block = block_of(x_TI.shape[0], *weight_OI.shape, gated=False)
    if block is not None:
        from lockstep.ops.linear.blocks import can_be_copied
        from lockstep.ops.linear.hopper import can_be_multiplied, hopper_product

        if can_be_copied(x_TI) and can_be_multiplied(weight_OI, gated=False):
            return hopper_product(x_TI, weight_OI, bias_O, block, cache_dir)
    return triton_linear(x_TI, weight_OI, bias_O)


@cache
def _with_measured(cache_dir: Path) -> Callable[..., Any]:
    return partial(linear, cache_dir=cache_dir)


def compile_later(
    signature: Signature, cache_dir: Path, device: torch.device
) -> Iterator[Callable[[], object]]:
    """The kernel of each number of rows that it takes."""
    from lockstep.ops.linear.hopper import programs

    return programs(signature, cache_dir, device)


KERNELS = (
    Kernel(
        op="linear",
        provider="cuda",
        verified_on=("NVIDIA H100",),
        function=linear,
        platforms=frozenset({"cuda"}),
        features=frozenset({"sm_90", "triton", "cuda_bindings"}),
        refuses=refuses,
        with_measured=_with_measured,
        compile_later=compile_later,
    ),
)
