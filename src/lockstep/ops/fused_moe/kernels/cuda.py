"""Our own kernel for Hopper for the second product of pairs by themselves; what Triton's does for all else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lockstep.ops.contract import Kernel, Signature
from lockstep.ops.fused_moe.hopper_down_blocks import DownShape, block_of

if TYPE_CHECKING:
    from lockstep.ops.grouped_gemm.tiles import Tile

_DTYPES = (torch.bfloat16, torch.float16)


def _refuses(signature: Signature) -> str | None:
    dtype = signature["dtype"]
    if dtype not in _DTYPES:
        return f"multiplies bfloat16 and float16, not {dtype}"
    shape = DownShape(signature["top_k"], signature["width"], signature["inner"])
    if block_of(1, shape) is None:
        return f"has no block for {shape.top_k} experts of a token with inner size {shape.inner}"
    from lockstep.ops.cuda_program import missing_compiler

    return missing_compiler()


def fused_moe(
    hidden_TD: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    measured_in: Path | None = None,
) -> torch.Tensor:
    """See the contract. Measured plans and compiled kernels lie in `measured_in`, if one is given."""
    from lockstep.ops.fused_moe.programs import mix_experts

    down = partial(_down_of_pairs, cache_dir=measured_in)
    return mix_experts(hidden_TD, gate_up_E2FD, down_EDF, weights_TK, ids_TK, measured_in, down)


def _down_of_pairs(
    inner_PF: torch.Tensor,
    down_EDF: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    tile: Tile,
    *,
    cache_dir: Path | None,
) -> torch.Tensor:
    from lockstep.ops.fused_moe.hopper_down import can_be_copied, weighted_down
    from lockstep.ops.fused_moe.programs import down_of_pairs

    num_tokens, top_k = ids_TK.shape
    block = block_of(num_tokens, DownShape(top_k, *down_EDF.shape[1:]))
    if block is None or not can_be_copied(down_EDF):
        return down_of_pairs(inner_PF, down_EDF, weights_TK, ids_TK, tile)
    return weighted_down(inner_PF, down_EDF, weights_TK, ids_TK, block, cache_dir)


def compile_later(
    signature: Signature, cache_dir: Path, device: torch.device
) -> Iterator[Callable[[], object]]:
    """The second product of each number of tokens that it takes."""
    from lockstep.ops.fused_moe.hopper_down import programs

    shape = DownShape(signature["top_k"], signature["width"], signature["inner"])
    return programs(shape, signature["dtype"], device, cache_dir)


@cache
def _with_measured(cache_dir: Path) -> Callable[..., Any]:
    """One function for each folder: call sites that share it are the same kernel."""
    return partial(fused_moe, measured_in=cache_dir)


KERNELS = (
    Kernel(
        op="fused_moe",
        provider="cuda",
        verified_on=("NVIDIA H100",),
        function=fused_moe,
        platforms=frozenset({"cuda"}),
        features=frozenset({"sm_90", "triton", "cuda_bindings"}),
        refuses=_refuses,
        with_measured=_with_measured,
        compile_later=compile_later,
    ),
)
