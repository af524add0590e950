"""Our own kernel for Hopper, which writes the best of each row and no scores; else linear's and choose_greedy's.

It computes a score as linear's kernel for Hopper does, bit for bit, so that both choose alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from lockstep.ops.contract import Kernel, Signature
from lockstep.ops.linear.hopper_blocks import block_of
from lockstep.ops.linear.kernels.cuda import linear, refuses


def linear_choose_greedy(
    x_RI: torch.Tensor,
    weight_VI: torch.Tensor,
    owners_R: torch.Tensor,
    last_tokens_S: torch.Tensor,
    *,
    cache_dir: Path | None = None,
) -> torch.Tensor:
    """See the contract. Compiled kernels are kept in `cache_dir`, if one is given."""
    from lockstep.ops.choose_greedy.programs import choose, choose_of
    from lockstep.ops.linear.blocks import can_be_copied
    from lockstep.ops.linear.hopper import can_be_multiplied, finds_best, hopper_best

    block = block_of(len(x_RI), *weight_VI.shape, gated=False)
    lies_well = can_be_copied(x_RI) and can_be_multiplied(weight_VI, gated=False)
    if lies_well and block is not None and finds_best(block, len(x_RI)):
        return choose_of(hopper_best(x_RI, weight_VI, block, cache_dir), owners_R, last_tokens_S)
    return choose(linear(x_RI, weight_VI, cache_dir=cache_dir), owners_R, last_tokens_S)


@cache
def _with_measured(cache_dir: Path) -> Callable[..., Any]:
    return partial(linear_choose_greedy, cache_dir=cache_dir)


def compile_later(
    signature: Signature, cache_dir: Path, device: torch.device
) -> Iterator[Callable[[], object]]:
    """The kernel of each number of rows that it takes."""
    from lockstep.ops.linear.hopper import programs

    return programs(signature, cache_dir, device, best=True)


KERNELS = (
    Kernel(
        op="linear_choose_greedy",
        provider="cuda",
        verified_on=("NVIDIA H100",),
        function=linear_choose_greedy,
        platforms=frozenset({"cuda"}),
        features=frozenset({"sm_90", "triton", "cuda_bindings"}),
        refuses=refuses,
        with_measured=_with_measured,
        compile_later=compile_later,
    ),
)
