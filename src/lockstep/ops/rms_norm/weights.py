"""What other people's norms ask of the weight."""

from __future__ import annotations

from lockstep.ops.contract import Signature


def refuses_mixed_dtypes(signature: Signature) -> str | None:
    """The predicate of kernels whose fused form takes one dtype only."""
    dtype, weight_dtype = signature["dtype"], signature["weight_dtype"]
    if weight_dtype != dtype:
        return f"is fused only where the weight is {dtype} too, not {weight_dtype}"
    return None
