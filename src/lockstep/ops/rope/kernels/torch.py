"""Stock operators: products with whole rows instead of four halves."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel, Signature


def _refuses(signature: Signature) -> str | None:
    if signature["rotated"] != signature["head_dim"]:
        return "rotates whole heads only"
    if signature["interleaved"]:
        return "rotates halves, not neighbouring elements"
    return None


def rope(
    x_TNH: torch.Tensor,
    cos_TR2: torch.Tensor,
    sin_TR2: torch.Tensor,
    out_dtype: torch.dtype,
    interleaved: bool = False,
) -> torch.Tensor:
    """See the contract."""
    half = cos_TR2.shape[-1]
    x_TN2R2 = x_TNH.float().unflatten(-1, (2, half))
    cos_T11R2 = cos_TR2[:, None, None]
    # In place on the fresh product: each half takes the other one's sine term.
    out = x_TN2R2 * cos_T11R2
    sin_T1R2 = sin_TR2[:, None]
    out[:, :, 0].addcmul_(x_TN2R2[:, :, 1], sin_T1R2, value=-1)
    out[:, :, 1].addcmul_(x_TN2R2[:, :, 0], sin_T1R2)
    return out.flatten(-2).to(out_dtype)


KERNELS = (
    Kernel(op="rope", provider="torch", function=rope, refuses=_refuses, verified_on=("cpu", "NVIDIA H100")),
)
