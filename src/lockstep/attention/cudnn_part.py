"""cuDNN's fused attention of single tokens, with tables and lengths written once a step for all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lockstep.attention.backend import AttentionSpec, Span
from lockstep.attention.part import AttentionPart, owned_pages
from lockstep.attention.spans import Spans
from lockstep.kv.pool.pool import LayerKV
from lockstep.ops.attention_decode.kernels.cudnn import AttentionCalls, SequenceTables
from lockstep.ops.contract import Kernel


class CudnnDecode(AttentionPart):
    """Its graphs are kept from step to step."""

    def __init__(self, kernel: Kernel) -> None:
        self.provider = kernel.provider
        self._calls: AttentionCalls | None = None

    def plan(self, spans: Sequence[Span], *, page_size: int, device: torch.device) -> SequenceTables:
        if self._calls is None:
            self._calls = AttentionCalls(device)
        batch = Spans.of(spans, page_size)
        return SequenceTables.of(owned_pages(batch), page_size, device, batch.stage)

    def run(
        self,
        plan: SequenceTables,
        q_TNH: torch.Tensor,
        kv: LayerKV,
        spec: AttentionSpec,
        out_TNH: torch.Tensor,
    ) -> None:
        assert self._calls is not None, "a step is planned before it is run"
        self._calls.run(plan, q_TNH, kv.k_NPSH, kv.v_NPSH, out_TNH, spec.scale, spec.window)
        if plan.num_rows < q_TNH.shape[0]:
            out_TNH[plan.num_rows :].zero_()
