"""One Triton program, a few lanes of a warp to each row: every logit is read once from memory."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel, Signature
from lockstep.ops.moe_topk_softmax.kernels.triton import refuses_sizes

_MOST_GROUPS = 32
"""Every group is compared with every other one."""


def _refuses(signature: Signature) -> str | None:
    if signature["num_groups"] > _MOST_GROUPS:
        return f"compares {_MOST_GROUPS} groups, not {signature['num_groups']}"
    return refuses_sizes(signature)


def moe_topk_sigmoid(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    top_k: int,
    num_groups: int,
    top_k_groups: int,
    renormalise: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract."""
    from lockstep.ops.moe_topk_sigmoid.programs import route

    return route(logits_TE, bias_E, top_k, num_groups, top_k_groups, renormalise, scale)


KERNELS = (
    Kernel(
        op="moe_topk_sigmoid",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=moe_topk_sigmoid,
        platforms=frozenset({"cuda", "rocm", "musa"}),
        features=frozenset({"triton"}),
        refuses=_refuses,
    ),
)
