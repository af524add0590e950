"""Keys and values written by the native extension, converted on the way."""

from __future__ import annotations

import torch

from lockstep.ops.native import native_kernels
from lockstep.ops.native_rows import refuses_dtypes, run


def kv_store(
    k_TNH: torch.Tensor,
    v_TNH: torch.Tensor,
    k_NPSH: torch.Tensor,
    v_NPSH: torch.Tensor,
    slots_T: torch.Tensor,
    *,
    instruction_set: str,
) -> None:
    """See the contract. Raises ValueError when a slot lies beyond the pool."""
    run("kv_store", instruction_set, k_TNH, v_TNH, k_NPSH, v_NPSH, slots_T)


KERNELS = native_kernels("kv_store", kv_store, refuses=refuses_dtypes)
