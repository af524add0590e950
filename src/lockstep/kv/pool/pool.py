"""Paged keys and values.

Shapes: L keys and values of the layers that are alike, N KV heads of this rank, P pages, S slots of a page, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lockstep.core.errors import OutOfMemory


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one layer keeps per token on this rank."""

    num_kv_heads: int
    head_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * dtype.itemsize


@dataclass(frozen=True, slots=True)
class LayerKV:
    """Keys and values of one layer. Heads come first, so that the tokens of one head lie together."""

    k_NPSH: torch.Tensor
    v_NPSH: torch.Tensor


class KVPool:
    """Keys and values of every layer, in pages of `page_size` slots. `stacks` hold those of layers that are alike, one
    tensor [L, N, P, S, H] each: the keys of a layer, its values, those of the next one.

    The pool owns memory and nothing else: which page belongs to whom is kv.index's business. Slot s of page p is
    number p * page_size + s. `allocate` gives zeros on the pool's device: slots that padding reads must be finite,
    for 0 * NaN is NaN. Raises OutOfMemory when the device has no room.
    """

    def __init__(
        self,
        layers: tuple[KVShape, ...],
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        allocate: Callable[[tuple[int, ...], torch.dtype], torch.Tensor],
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.dtype = dtype
        self.total_bytes = sum(shape.bytes_per_token(dtype) for shape in layers) * num_pages * page_size
        try:
            stacks = {
                shape: self._allocate(shape, layers.count(shape), allocate) for shape in dict.fromkeys(layers)
            }
        except (RuntimeError, MemoryError, OSError) as error:
            raise OutOfMemory(
                f"the KV pool needs {self.total_bytes / 2**30:.2f} GiB for {num_pages * page_size} tokens and the "
                "device does not have it; lower --max-total-tokens, --mem-fraction-static or --context-length"
            ) from error
        self.stacks = tuple(stacks.values())
        places = {shape: iter(range(0, 2 * layers.count(shape), 2)) for shape in stacks}
        self._places = tuple((stacks[shape], next(places[shape])) for shape in layers)
        self.layers = tuple(LayerKV(stack[at], stack[at + 1]) for stack, at in self._places)

    def layer(self, number: int) -> LayerKV:
        """Keys and values of a layer, as a forward is to reach them."""
        if not torch.compiler.is_compiling():
            return self.layers[number]
        # Two inputs in one storage that are both written: of one, a compiler makes a copy each step, and Inductor of
        # PyTorch 2.11 copies what lies elsewhere. Parts of one input are written where they are.
        stack, at = self._places[number]
        return LayerKV(stack[at], stack[at + 1])

    def _allocate(
        self,
        shape: KVShape,
        num_layers: int,
        allocate: Callable[[tuple[int, ...], torch.dtype], torch.Tensor],
    ) -> torch.Tensor:
        size = (2 * num_layers, shape.num_kv_heads, self.num_pages, self.page_size, shape.head_dim)
        return allocate(size, self.dtype)
