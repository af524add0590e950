"""The Triton program of copy_words. Importing it imports Triton.

Pinned memory of the host has an address on the device, under which kernels read and write it over the bus.
Source: CUDA Programming Guide, "Mapped Memory" and "Unified Virtual Address Space". Shapes: R rows, W words.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.dependent_launch import dependent_launch, wait_for_inputs

_BLOCK = 1024
_NARROW = 128


@triton.jit(do_not_specialize=["num_words", "source_stride", "target_stride"])
def _copy(
    source_ptr: tl.tensor,
    target_ptr: tl.tensor,
    num_words: tl.tensor,
    source_stride: tl.tensor,
    target_stride: tl.tensor,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = word < num_words
    wait_for_inputs(PDL, NEXT_FIRST=True)
    words = tl.load(source_ptr + row * source_stride + word, mask=inside, other=0)
    tl.store(target_ptr + row * target_stride + word, words, mask=inside)


def copy(source_RW: torch.Tensor, target_RW: torch.Tensor) -> None:
    """See the contract of copy_words."""
    num_rows, num_words = source_RW.shape
    if num_rows == 0 or num_words == 0:
        return
    block = _NARROW if num_words <= _NARROW else _BLOCK
    _copy[(num_rows, triton.cdiv(num_words, block))](
        source_RW,
        target_RW,
        num_words,
        source_RW.stride(0),
        target_RW.stride(0),
        BLOCK=block,
        num_warps=4 if block == _NARROW else 8,
        **dependent_launch(),
    )
