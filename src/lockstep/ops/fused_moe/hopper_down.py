"""The second product of a mixture on Hopper, in CUDA C++, for few tokens. Importing it imports NVIDIA's bindings.

Shapes: T tokens, D model, E experts, F inner width, K experts of each token, P = T * K pairs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch

from lockstep.ops.cuda_program import CudaProgram, Launch, architecture_of, hopper_source, machine_code
from lockstep.ops.fused_moe.hopper_down_blocks import FEW_TOKENS, DownBlock, DownShape, block_of, shared_bytes

_SOURCE = Path(__file__).with_name("hopper_down.cu")
_ALIGNED_BYTES = 16


def can_be_copied(down_EDF: torch.Tensor) -> bool:
    """Whether rows of an expert follow each other, where the device's engine copies from."""
    return down_EDF.is_contiguous() and down_EDF.data_ptr() % _ALIGNED_BYTES == 0


def source(block: DownBlock, shape: DownShape, dtype: torch.dtype) -> str:
    """CUDA C++ for one block."""
    facts = {
        "INPUTS": shape.inner,
        "TOP_K": shape.top_k,
        "ROWS": block.rows,
        "WARPS": block.warps,
        "AT_ONCE": block.at_once,
        "STAGES": block.stages,
        "HALF": int(dtype == torch.float16),
    }
    return hopper_source(facts, _SOURCE.read_text())


@cache
def _program(
    block: DownBlock, shape: DownShape, dtype: torch.dtype, device: torch.device, cache_dir: Path | None
) -> CudaProgram:
    text = source(block, shape, dtype)
    return CudaProgram(text, "weighted_down", device, cache_dir, shared_bytes=shared_bytes(block, shape))


def programs(
    shape: DownShape, dtype: torch.dtype, device: torch.device, cache_dir: Path
) -> Iterator[Callable[[], object]]:
    """Of each number of tokens, as functions that compile into `cache_dir`."""
    for block in dict.fromkeys(block_of(count, shape) for count in range(1, FEW_TOKENS + 1)):
        if block is not None:
            yield partial(machine_code, source(block, shape, dtype), architecture_of(device), cache_dir)


@cache
def _launch(block: DownBlock, shape: DownShape, blocks: int) -> Launch:
    return Launch(blocks, 1, 32 * block.warps, shared_bytes(block, shape), early=True)


def weighted_down(
    inner_PF: torch.Tensor,
    down_EDF: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    block: DownBlock,
    cache_dir: Path | None,
) -> torch.Tensor:
    """Each token's experts' outputs [T, D], weighted and added in float32 in the order of the choices.

    Must be submitted right behind the kernel that makes inner_PF: before that one has ended, weights_TK and ids_TK are
    read, which are there when it lets another kernel start. `can_be_copied` is true of down_EDF; inner_PF and
    weights_TK are contiguous. The compiled kernel is kept in `cache_dir`, if one is given.
    """
    _, width, inner = down_EDF.shape
    num_tokens, top_k = ids_TK.shape
    shape = DownShape(top_k, width, inner)
    out_TD = inner_PF.new_empty(num_tokens, width)
    blocks = num_tokens * -(-width // block.rows)
    places = (down_EDF, inner_PF, weights_TK, ids_TK, out_TD)
    _program(block, shape, inner_PF.dtype, inner_PF.device, cache_dir).launch(
        _launch(block, shape, blocks),
        (
            *(ctypes.c_void_p(each.data_ptr()) for each in places),
            *(ctypes.c_uint32(size) for size in (num_tokens, width, *ids_TK.stride())),
        ),
    )
    return out_TD
