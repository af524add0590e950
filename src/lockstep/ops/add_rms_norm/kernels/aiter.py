"""The norm with residual of AMD's kernel package aiter."""

from __future__ import annotations

import importlib

import torch

from lockstep.ops import packages
from lockstep.ops.contract import Kernel, Signature
from lockstep.ops.rms_norm.weights import refuses_mixed_dtypes

_lacks_aiter = packages.required("aiter", (torch.bfloat16, torch.float16))


def _refuses(signature: Signature) -> str | None:
    return refuses_mixed_dtypes(signature) or _lacks_aiter(signature)


def add_rms_norm(
    update_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract."""
    update_RD, residual_RD = (
        each.reshape(-1, each.shape[-1]).contiguous() for each in (update_TD, residual_TD)
    )
    out_RD, total_RD = torch.empty_like(update_RD), torch.empty_like(residual_RD)
    if update_RD.numel():
        importlib.import_module("aiter").rmsnorm2d_fwd_with_add(
            out_RD, update_RD, residual_RD, total_RD, weight_D, eps
        )
    return out_RD.view(update_TD.shape), total_RD.view(residual_TD.shape)


KERNELS = (
    Kernel(
        op="add_rms_norm",
        provider="aiter",
        function=add_rms_norm,
        platforms=frozenset({"rocm"}),
        refuses=_refuses,
    ),
)
