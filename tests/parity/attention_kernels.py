"""Attention backends as kernels of paged_attention, so that the same cases judge them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lockstep.attention.backend import AttentionBackend, AttentionSpec
from lockstep.kv.pool.pool import LayerKV
from lockstep.ops.contract import Kernel
from lockstep.ops.paged_attention.reference import Span


def attention_kernel(backend: AttentionBackend) -> Kernel:
    """Plans and runs one layer, as a step does for all of them."""

    def run(
        q_TNH: torch.Tensor,
        k_KPSH: torch.Tensor,
        v_KPSH: torch.Tensor,
        spans: Sequence[Span],
        scale: float,
        window: int,
        soft_cap: float,
    ) -> torch.Tensor:
        # Another window among the layers must not disturb this one's.
        windows = dict.fromkeys((0, window))
        plan: Any = backend.plan(spans, page_size=k_KPSH.shape[2], windows=tuple(windows), device=q_TNH.device)
        return backend.run(plan, q_TNH, LayerKV(k_KPSH, v_KPSH), AttentionSpec(scale, window, soft_cap))

    return Kernel(op="paged_attention", provider=backend.name, function=run, refuses=type(backend).refuses)
