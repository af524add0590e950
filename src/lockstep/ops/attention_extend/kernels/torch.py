"""scaled_dot_product_attention for each sequence. Stock operators know no pages: keys are gathered first.

Shapes: T new tokens, N query heads, K KV heads, H head dim, P pages, L keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lockstep.ops.contract import Kernel, Signature


def refuses(signature: Signature) -> str | None:
    """What attention_decode and attention_extend in stock operators cannot serve."""
    if signature["soft_cap"]:
        return "soft-capped scores are not among torch's fused attentions"
    if signature["sinks"]:
        return "sinks are not among torch's fused attentions"
    return None


class GatherRoom:
    """Room for gathered keys and values, kept from layer to layer and from step to step.

    Fresh memory for each layer would be given back to the system and mapped again: that costs more than the copy.
    """

    def __init__(self) -> None:
        self._rooms: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def gather(self, use: str, pool_KPSH: torch.Tensor, pages_P: torch.Tensor) -> torch.Tensor:
        """The pages [K, len(pages), S, H] of a pool, valid until the same `use` gathers again."""
        shape = (pool_KPSH.shape[0], pages_P.shape[0], *pool_KPSH.shape[2:])
        size = math.prod(shape)
        room = self._rooms.get((use, pool_KPSH.dtype))
        if room is None or room.numel() < size:
            room = self._rooms[use, pool_KPSH.dtype] = pool_KPSH.new_empty(size + size // 4)
        return torch.index_select(pool_KPSH, 1, pages_P, out=room[:size].view(shape))


@dataclass(frozen=True, slots=True)
class ExtendItem:
    """New tokens of one sequence. `seen` maps a window to the mask; None means plain causal from 0."""

    rows: slice
    num_keys: int
    pages_P: torch.Tensor
    seen_TL: dict[int, torch.Tensor | None]

    def covers(self, num_rows: int) -> bool:
        """True when its rows are all of q."""
        return self.rows == slice(0, num_rows)


def plan_item(
    rows: slice,
    num_keys: int,
    page_ids: Sequence[int],
    *,
    page_size: int,
    windows: Sequence[int],
    device: torch.device,
) -> ExtendItem:
    """What layers with these windows share of a step, for one sequence whose new tokens are the rows of q."""
    start = num_keys - (rows.stop - rows.start)
    pages = list(page_ids)[: -(-num_keys // page_size)]
    seen: dict[int, torch.Tensor | None] = {}
    for window in windows:
        if start == 0 and (not window or window >= num_keys):
            seen[window] = None
            continue
        position_T1 = torch.arange(start, num_keys, device=device)[:, None]
        key_L = torch.arange(num_keys, device=device)
        mask_TL = key_L <= position_T1
        if window:
            mask_TL &= key_L > position_T1 - window
        seen[window] = mask_TL
    return ExtendItem(rows, num_keys, torch.tensor(pages, device=device), seen)


def run_item(
    item: ExtendItem,
    q_TNH: torch.Tensor,
    k_KPSH: torch.Tensor,
    v_KPSH: torch.Tensor,
    scale: float,
    window: int,
    room: GatherRoom,
) -> torch.Tensor:
    """out [T, N, H] of the item's own rows, in the dtype of q."""
    k_1KLH, v_1KLH = (
        room.gather(use, pool, item.pages_P).flatten(1, 2)[None, :, : item.num_keys]
        for use, pool in (("k", k_KPSH), ("v", v_KPSH))
    )
    mask_TL = item.seen_TL[window]
    out_1NTH = torch.nn.functional.scaled_dot_product_attention(
        q_TNH.to(k_1KLH.dtype).transpose(0, 1)[None],
        k_1KLH,
        v_1KLH,
        attn_mask=mask_TL,
        is_causal=mask_TL is None,
        scale=scale,
        enable_gqa=True,
    )
    return out_1NTH[0].transpose(0, 1).to(q_TNH.dtype)


def attention_extend(
    q_TNH: torch.Tensor,
    k_KPSH: torch.Tensor,
    v_KPSH: torch.Tensor,
    page_table_BP: torch.Tensor,
    cu_rows_B1: torch.Tensor,
    num_keys_B: torch.Tensor,
    sinks_N: torch.Tensor | None,
    out_TNH: torch.Tensor,
    scale: float,
    window: int,
    soft_cap: float,
) -> None:
    """See the contract. Lengths are read on the host; a backend plans once for all layers instead."""
    room = GatherRoom()
    bounds = cu_rows_B1.tolist()
    out_TNH.zero_()
    for index, (num_keys, pages) in enumerate(zip(num_keys_B.tolist(), page_table_BP.tolist(), strict=True)):
        rows = slice(bounds[index], bounds[index + 1])
        if num_keys == 0 or rows.start == rows.stop:
            continue
        item = plan_item(
            rows, num_keys, pages, page_size=k_KPSH.shape[2], windows=(window,), device=q_TNH.device
        )
        out_TNH[rows] = run_item(item, q_TNH[rows], k_KPSH, v_KPSH, scale, window, room)


KERNELS = (
    Kernel(
        op="attention_extend",
        provider="torch",
        function=attention_extend,
        refuses=refuses,
        verified_on=("cpu", "NVIDIA H100"),
        asks_host=True,
    ),
)
