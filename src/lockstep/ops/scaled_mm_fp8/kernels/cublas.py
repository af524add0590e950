"""cuBLAS (CUTLASS for some of the scales per row) through torch's scaled product."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel, Signature


def _refuses(signature: Signature) -> str | None:
    if signature["scaling"] == "block":
        return "takes a scale per tensor or per row, not per block"
    if signature["dtype"] not in (torch.bfloat16, torch.float16):
        return f"sums too coarsely for results in {signature['dtype']}"
    if signature["inputs"] % 16 or signature["outputs"] % 16:
        return f"wants multiples of 16, not {signature['inputs']} inputs and {signature['outputs']} outputs"
    return None


def scaled_mm_fp8(
    a_TI: torch.Tensor,
    b_OI: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias_O: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See the contract."""
    if not a_TI.shape[0]:
        return torch.empty(0, b_OI.shape[0], dtype=dtype, device=a_TI.device)
    # Some of torch's products per row take rows to lie side by side without looking.
    return torch._scaled_mm(
        a_TI.contiguous(),
        b_OI.contiguous().T,
        scale_a=a_scale,
        scale_b=b_scale.T,
        bias=bias_O,
        out_dtype=dtype,
        use_fast_accum=False,
    )


KERNELS = (
    Kernel(
        op="scaled_mm_fp8",
        provider="cublas",
        verified_on=("NVIDIA H100",),
        function=scaled_mm_fp8,
        platforms=frozenset({"cuda"}),
        features=frozenset({"fp8"}),
        refuses=_refuses,
    ),
)
