"""What kernels in CUDA C++ have in common that attend over pages on a Hopper. Importing it imports NVIDIA's
bindings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch

from lockstep.ops.cuda_program import TensorMap, hopper_source, tensor_map
from lockstep.ops.norm_rope_attention_decode.hopper_blocks import TILE

_PARTS = Path(__file__).with_suffix(".cu")
_LINE = 64
"""Elements of a line of shared memory."""


def attention_source(facts: Mapping[str, int], text: str) -> str:
    """CUDA C++ of a kernel that attends."""
    return hopper_source(facts, _PARTS.read_text(), text)


def tile_map(pool_KPSH: torch.Tensor) -> TensorMap:
    """A tile of keys, or of values, of one head and page. The same for the same place and shape, whatever is in it."""
    return _map_of(pool_KPSH.data_ptr(), pool_KPSH.dtype, tuple(pool_KPSH.shape), pool_KPSH.stride())


@lru_cache(maxsize=4096)
def _map_of(pointer: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> TensorMap:
    num_heads, num_pages, page_size, head_dim = shape
    head, page, slot, _ = strides
    halves = head_dim // _LINE
    sizes = (_LINE, page_size, halves, num_pages, num_heads)
    return tensor_map(pointer, dtype, sizes, (slot, _LINE, page, head), (_LINE, TILE, halves, 1, 1))
