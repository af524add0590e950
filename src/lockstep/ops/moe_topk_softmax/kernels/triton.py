"""One Triton program, a few lanes of a warp to each row: every logit is read once from memory."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel, Signature

MOST_CHOSEN = 8
MOST_EXPERTS = 1024
"""What a list of keys holds, and what the registers of eight lanes do; see `lists.py` and `tiles.py`."""


def refuses_sizes(signature: Signature) -> str | None:
    """The reason why lists of eight keys cannot serve a router of this size, if there is one."""
    if signature["top_k"] > MOST_CHOSEN:
        return f"keeps the best {MOST_CHOSEN} experts, not {signature['top_k']}"
    if signature["experts"] > MOST_EXPERTS:
        return f"reads {MOST_EXPERTS} experts, not {signature['experts']}"
    return None


def moe_topk_softmax(
    logits_TE: torch.Tensor, top_k: int, renormalise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract."""
    from lockstep.ops.moe_topk_softmax.programs import route

    return route(logits_TE, top_k, renormalise)


KERNELS = (
    Kernel(
        op="moe_topk_softmax",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=moe_topk_softmax,
        platforms=frozenset({"cuda", "rocm", "musa"}),
        features=frozenset({"triton"}),
        refuses=refuses_sizes,
    ),
)
