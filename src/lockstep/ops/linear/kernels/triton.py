"""Triton programs for few rows, which read the weight as fast as the device can; torch's linear for more."""

from __future__ import annotations

from functools import cache

import torch

from lockstep.ops.contract import Kernel, Signature
from lockstep.ops.linear.reference import linear as torch_linear
from lockstep.ops.linear.tiles import Block, Library, tile_of

_DTYPES = (torch.bfloat16, torch.float16)


def _refuses(signature: Signature) -> str | None:
    dtype = signature["dtype"]
    return None if dtype in _DTYPES else f"multiplies bfloat16 and float16, not {dtype}"


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """See the contract. Where rows do not lie as a program reads them, it is torch's linear too."""
    tile = tile_of(x_TI.shape[0], *weight_OI.shape)
    if isinstance(tile, Block):
        from lockstep.ops.linear.blocks import block_product, can_be_copied

        if can_be_copied(x_TI) and can_be_copied(weight_OI):
            return block_product(x_TI, weight_OI, bias_O, tile)
    elif isinstance(tile, Library):
        if bias_O is None:
            bias_O = _zeros(weight_OI.shape[0], x_TI.dtype, x_TI.device)
    elif tile is not None and x_TI.stride(1) == weight_OI.stride(1) == 1:
        from lockstep.ops.linear.programs import product

        return product(x_TI, weight_OI, bias_O, tile)
    return torch_linear(x_TI, weight_OI, bias_O)


@cache
def _zeros(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Kept, since a graph may hold it."""
    return torch.zeros(count, dtype=dtype, device=device)


KERNELS = (
    Kernel(
        op="linear",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=linear,
        platforms=frozenset({"cuda"}),
        features=frozenset({"triton"}),
        refuses=_refuses,
    ),
)
