"""index_copy along the slots."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel


def kv_store(
    k_TNH: torch.Tensor, v_TNH: torch.Tensor, k_NPSH: torch.Tensor, v_NPSH: torch.Tensor, slots_T: torch.Tensor
) -> None:
    """See the contract. Whether there is padding is asked on the host: a graph cannot hold this kernel."""
    # On the meta device there are no slots to ask, only shapes to check.
    if slots_T.numel() and not slots_T.is_meta and int(slots_T.min()) < 0:
        real_T = slots_T >= 0
        k_TNH, v_TNH, slots_T = k_TNH[real_T], v_TNH[real_T], slots_T[real_T]
    k_NPSH.flatten(1, 2).index_copy_(1, slots_T, k_TNH.transpose(0, 1).to(k_NPSH.dtype))
    v_NPSH.flatten(1, 2).index_copy_(1, slots_T, v_TNH.transpose(0, 1).to(v_NPSH.dtype))


KERNELS = (
    Kernel(
        op="kv_store",
        provider="torch",
        function=kv_store,
        verified_on=("cpu", "NVIDIA H100"),
        asks_host=True,
    ),
)
