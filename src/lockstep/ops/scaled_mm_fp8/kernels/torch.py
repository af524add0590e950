"""Stock products of the codes in float32, block by block where scales differ along the inputs."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel
from lockstep.ops.scaled_mm_fp8.reference import BLOCK


def scaled_mm_fp8(
    a_TI: torch.Tensor,
    b_OI: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias_O: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See the contract."""
    num_blocks = a_scale.shape[1]
    if num_blocks == 1:
        out_TO = _product(a_TI, b_OI)
        out_TO *= a_scale
        out_TO *= _of_outputs(b_scale[:, 0], b_OI.shape[0])
    else:
        out_TO = torch.zeros(a_TI.shape[0], b_OI.shape[0], device=a_TI.device)
        for block in range(num_blocks):
            inputs = slice(block * BLOCK, (block + 1) * BLOCK)
            product_TO = _product(a_TI[:, inputs], b_OI[:, inputs])
            product_TO *= a_scale[:, block, None]
            out_TO.addcmul_(product_TO, _of_outputs(b_scale[:, block], b_OI.shape[0])[None])
    if bias_O is not None:
        out_TO += bias_O
    return out_TO.to(dtype)


def _product(a_TI: torch.Tensor, b_OI: torch.Tensor) -> torch.Tensor:
    return torch.mm(a_TI.float(), b_OI.float().T)


def _of_outputs(scale: torch.Tensor, outputs: int) -> torch.Tensor:
    """One scale for each output, or the one for all."""
    return scale if scale.shape[0] in (1, outputs) else scale.repeat_interleave(BLOCK)[:outputs]


KERNELS = (
    Kernel(op="scaled_mm_fp8", provider="torch", function=scaled_mm_fp8, verified_on=("cpu", "NVIDIA H100")),
)
