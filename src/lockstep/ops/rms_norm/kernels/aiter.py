"""The norm of AMD's kernel package aiter."""

from __future__ import annotations

import importlib

import torch

from lockstep.ops import packages
from lockstep.ops.contract import Kernel, Signature
from lockstep.ops.rms_norm.weights import refuses_mixed_dtypes

_lacks_aiter = packages.required("aiter", (torch.bfloat16, torch.float16))


def _refuses(signature: Signature) -> str | None:
    return refuses_mixed_dtypes(signature) or _lacks_aiter(signature)


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """See the contract."""
    rows_RD = x_TD.reshape(-1, x_TD.shape[-1]).contiguous()
    out_RD = importlib.import_module("aiter").rms_norm(rows_RD, weight_D, eps) if rows_RD.numel() else rows_RD
    return out_RD.view(x_TD.shape)


KERNELS = (
    Kernel(
        op="rms_norm",
        provider="aiter",
        function=rms_norm,
        platforms=frozenset({"rocm"}),
        refuses=_refuses,
    ),
)
