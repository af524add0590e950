"""The kernels of stock torch operators, with their masks and page indices planned once for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lockstep.attention.backend import AttentionBackend, AttentionSpec, Span
from lockstep.kv.pool.pool import LayerKV
from lockstep.ops.attention_decode.kernels.torch import DecodeGroup, DecodeRow, plan_groups, run_group
from lockstep.ops.attention_extend.kernels.torch import ExtendItem, GatherRoom, plan_item, run_item


@dataclass(frozen=True, slots=True)
class TorchPlan:
    """A step, split by how it is best computed."""

    decode: tuple[DecodeGroup, ...]
    extend: tuple[ExtendItem, ...]


class TorchBackend(AttentionBackend):
    """One batched product for decode rows, scaled_dot_product_attention for each longer span."""

    name = "torch"

    def __init__(self) -> None:
        self._room = GatherRoom()

    def plan(
        self, spans: Sequence[Span], *, page_size: int, windows: Sequence[int], device: torch.device
    ) -> TorchPlan:
        decode: list[DecodeRow] = []
        extend: list[ExtendItem] = []
        row = 0
        for span in spans:
            if span.num_tokens == 1:
                decode.append(DecodeRow(row, span.num_kv_tokens, span.page_ids))
            else:
                rows = slice(row, row + span.num_tokens)
                item = plan_item(
                    rows,
                    span.num_kv_tokens,
                    span.page_ids,
                    page_size=page_size,
                    windows=windows,
                    device=device,
                )
                extend.append(item)
            row += span.num_tokens
        return TorchPlan(
            plan_groups(decode, page_size=page_size, windows=windows, device=device), tuple(extend)
        )

    def run(self, plan: TorchPlan, q_TNH: torch.Tensor, kv: LayerKV, spec: AttentionSpec) -> torch.Tensor:
        k, v, scale, window, room = kv.k_NPSH, kv.v_NPSH, spec.scale, spec.window, self._room
        num_rows, num_parts = q_TNH.shape[0], len(plan.decode) + len(plan.extend)
        if num_parts == 1 and plan.decode and plan.decode[0].covers(num_rows):
            return run_group(plan.decode[0], q_TNH, k, v, scale, window, room)
        if num_parts == 1 and plan.extend and plan.extend[0].covers(num_rows):
            return run_item(plan.extend[0], q_TNH, k, v, scale, window, room)
        out_TNH = torch.zeros_like(q_TNH)
        for group in plan.decode:
            out_TNH[group.rows_B] = run_group(group, q_TNH[group.rows_B], k, v, scale, window, room)
        for item in plan.extend:
            out_TNH[item.rows] = run_item(item, q_TNH[item.rows], k, v, scale, window, room)
        return out_TNH
