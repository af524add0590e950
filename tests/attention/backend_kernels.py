"""Attention backends as kernels of attention_extend, so that the contract's cases judge what they plan."""

from __future__ import annotations

from typing import Any

import torch

from lockstep.attention.backend import AttentionBackend, AttentionSpec, Span
from lockstep.kv.pool.pool import LayerKV
from lockstep.ops.contract import Kernel, Signature


def spans_of(
    page_table_BP: torch.Tensor, cu_rows_B1: torch.Tensor, num_keys_B: torch.Tensor, page_size: int
) -> list[Span]:
    """The sequences that have rows, with all the pages that the table gives them."""
    bounds = cu_rows_B1.tolist()
    spans = []
    for index, num_keys in enumerate(num_keys_B.tolist()):
        num_rows = bounds[index + 1] - bounds[index]
        if num_rows:
            pages = [page for page in page_table_BP[index].tolist() if page >= 0]
            assert len(pages) * page_size >= num_keys
            spans.append(Span(num_keys - num_rows, num_rows, pages))
    return spans


def backend_kernel(backend: AttentionBackend, planned_by: Kernel) -> Kernel:
    """Plans and runs one layer, as a step does for all of them; refuses what its kernel does."""

    def run(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        page_table: torch.Tensor,
        cu_rows: torch.Tensor,
        num_keys: torch.Tensor,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
        scale: float,
        window: int,
        soft_cap: float,
    ) -> None:
        spans = spans_of(page_table, cu_rows, num_keys, k.shape[2])
        # Another window among the layers must not disturb this one's.
        windows = tuple(dict.fromkeys((0, window)))
        plan: Any = backend.plan(spans, page_size=k.shape[2], windows=windows, device=q.device)
        out.copy_(backend.run(plan, q, LayerKV(k, v), AttentionSpec(scale, window, soft_cap, sinks)))

    def refuses(signature: Signature) -> str | None:
        return planned_by.refuses(signature)

    return Kernel(op="attention_extend", provider=f"{backend.name} backend", function=run, refuses=refuses)
