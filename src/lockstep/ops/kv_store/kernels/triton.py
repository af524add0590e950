"""One Triton program for keys and values together; padding is skipped on the device."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel


def kv_store(
    k_TNH: torch.Tensor, v_TNH: torch.Tensor, k_NPSH: torch.Tensor, v_NPSH: torch.Tensor, slots_T: torch.Tensor
) -> None:
    """See the contract."""
    from lockstep.ops.kv_store.programs import store

    store(k_TNH, v_TNH, k_NPSH, v_NPSH, slots_T)


KERNELS = (
    Kernel(
        op="kv_store",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=kv_store,
        platforms=frozenset({"cuda", "rocm", "musa"}),
        features=frozenset({"triton"}),
    ),
)
