"""One Triton program: every new head is read once, and written once to where it is wanted."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel, Signature


def _refuses(signature: Signature) -> str | None:
    head_dim = signature["head_dim"]
    return None if head_dim % 2 == 0 else f"rotates halves of heads, not of {head_dim} elements"


def norm_rope_store(
    heads_TAH: torch.Tensor,
    q_weight_H: torch.Tensor | None,
    k_weight_H: torch.Tensor | None,
    eps: float,
    cos_TR2: torch.Tensor,
    sin_TR2: torch.Tensor,
    k_KPSH: torch.Tensor,
    v_KPSH: torch.Tensor,
    slots_T: torch.Tensor,
    q_TNH: torch.Tensor,
) -> None:
    """See the contract."""
    from lockstep.ops.norm_rope_store.programs import store_heads

    weights = (q_weight_H, k_weight_H)
    store_heads(heads_TAH, weights, eps, (cos_TR2, sin_TR2), (k_KPSH, v_KPSH), slots_T, q_TNH)


KERNELS = (
    Kernel(
        op="norm_rope_store",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=norm_rope_store,
        platforms=frozenset({"cuda", "rocm", "musa"}),
        features=frozenset({"triton"}),
        refuses=_refuses,
    ),
)
