"""The fused SwiGLU of AMD's kernel package aiter."""

from __future__ import annotations

import importlib

import torch

from lockstep.ops import packages
from lockstep.ops.contract import Kernel


def silu_and_mul(x_T2F: torch.Tensor) -> torch.Tensor:
    """See the contract."""
    out_TF = x_T2F.new_empty((*x_T2F.shape[:-1], x_T2F.shape[-1] // 2))
    if out_TF.numel():
        importlib.import_module("aiter").silu_and_mul(out_TF, x_T2F.contiguous())
    return out_TF


KERNELS = (
    Kernel(
        op="silu_and_mul",
        provider="aiter",
        function=silu_and_mul,
        platforms=frozenset({"rocm"}),
        refuses=packages.required("aiter", (torch.bfloat16, torch.float16)),
    ),
)
