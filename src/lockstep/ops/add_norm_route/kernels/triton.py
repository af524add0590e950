"""One Triton program for few rows; for more, the programs of the norm, the product and the choice."""

from __future__ import annotations

import torch

from lockstep.ops.add_norm_route.tiles import MOST_EXPERTS, tile_of
from lockstep.ops.contract import Kernel, Signature
from lockstep.ops.linear.kernels.triton import linear
from lockstep.ops.moe_topk_softmax.kernels.triton import refuses_sizes
from lockstep.ops.rows import refuses_wide_rows

_DTYPES = (torch.bfloat16, torch.float16)


def _refuses(signature: Signature) -> str | None:
    dtype, experts = signature["dtype"], signature["experts"]
    if dtype not in _DTYPES:
        # Keys of logits hold 16 bits and an id.
        return f"chooses by logits of bfloat16 and float16, not {dtype}"
    if experts > MOST_EXPERTS:
        return f"chooses among {MOST_EXPERTS} experts, not {experts}"
    return refuses_sizes(signature) or refuses_wide_rows({"width": signature["inputs"]})


def add_norm_route(
    update_TD: torch.Tensor | None,
    residual_TD: torch.Tensor,
    norm_weight_D: torch.Tensor,
    eps: float,
    router_ED: torch.Tensor,
    top_k: int,
    renormalise: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the contract."""
    from lockstep.ops.add_norm_route.programs import normalise_and_route
    from lockstep.ops.add_rms_norm.programs import add_and_normalise
    from lockstep.ops.moe_topk_softmax.programs import route
    from lockstep.ops.rms_norm.programs import normalise

    tile = tile_of(*residual_TD.shape)
    streams = (residual_TD,) if update_TD is None else (update_TD, residual_TD)
    if tile is not None and all(each.stride(1) == 1 for each in (*streams, router_ED)):
        norm = (norm_weight_D, eps)
        return normalise_and_route(update_TD, residual_TD, norm, router_ED, top_k, renormalise, tile)
    if update_TD is None:
        normed_TD, total_TD = normalise(residual_TD, norm_weight_D, eps, residual_TD.shape[1]), residual_TD
    else:
        normed_TD, total_TD = add_and_normalise(update_TD, residual_TD, norm_weight_D, eps)
    return normed_TD, total_TD, *route(linear(normed_TD, router_ED), top_k, renormalise)


KERNELS = (
    Kernel(
        op="add_norm_route",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=add_norm_route,
        platforms=frozenset({"cuda"}),
        features=frozenset({"triton"}),
        refuses=_refuses,
    ),
)
