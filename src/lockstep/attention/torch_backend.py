"""Attention from stock torch operators, on any device.

Shapes: T new tokens, N query heads, K KV heads, G query heads of a KV head, H head dim, B sequences, L keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lockstep.attention.backend import AttentionBackend, AttentionSpec
from lockstep.kv.pool.pool import LayerKV
from lockstep.ops.contract import Signature
from lockstep.ops.paged_attention.reference import Span, paged_attention


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Sequences with one new token each and similar lengths, padded to common pages.

    `rows_B` are their rows in q, a slice when they lie together. `bias` maps a window to what is added
    to the scores: 0 for keys that are seen, -inf for padding and keys before the window.
    """

    rows_B: torch.Tensor | slice
    pages_BP: torch.Tensor
    bias_B1L: dict[int, torch.Tensor]

    def covers(self, q_TNH: torch.Tensor) -> bool:
        """True when its rows are all of q, in order."""
        return isinstance(self.rows_B, slice) and self.rows_B.stop == q_TNH.shape[0]


@dataclass(frozen=True, slots=True)
class _ExtendItem:
    """Several new tokens of one sequence. `seen` maps a window to the mask; None means plain causal from 0."""

    first_row: int
    num_rows: int
    num_keys: int
    pages_P: torch.Tensor
    seen_TL: dict[int, torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class TorchPlan:
    """A step, split by how it is best computed."""

    decode: tuple[_DecodeGroup, ...]
    extend: tuple[_ExtendItem, ...]


class _Scratch:
    """Room for gathered keys and values, kept from layer to layer and from step to step.

    Fresh memory for each layer would be given back to the system and mapped again: that costs more than the copy.
    """

    def __init__(self) -> None:
        self._rooms: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def gather(self, use: str, pool_NPSH: torch.Tensor, pages_P: torch.Tensor) -> torch.Tensor:
        """The pages [N, len(pages), S, H] of a pool, valid until the same `use` gathers again."""
        shape = (pool_NPSH.shape[0], pages_P.shape[0], *pool_NPSH.shape[2:])
        size = math.prod(shape)
        room = self._rooms.get((use, pool_NPSH.dtype))
        if room is None or room.numel() < size:
            room = self._rooms[use, pool_NPSH.dtype] = pool_NPSH.new_empty(size + size // 4)
        return torch.index_select(pool_NPSH, 1, pages_P, out=room[:size].view(shape))


class TorchBackend(AttentionBackend):
    """One batched product for decode rows, scaled_dot_product_attention for each longer span.

    Pages are gathered into contiguous keys and values first: stock operators know no pages.
    """

    name = "torch"

    def __init__(self) -> None:
        self._scratch = _Scratch()

    @classmethod
    def refuses(cls, signature: Signature) -> str | None:
        if signature.get("soft_cap"):
            return "soft-capped scores are not among torch's fused attentions"
        return None

    def plan(
        self, spans: Sequence[Span], *, page_size: int, windows: Sequence[int], device: torch.device
    ) -> TorchPlan:
        decode_rows: list[tuple[int, Span]] = []
        extend: list[_ExtendItem] = []
        row = 0
        for span in spans:
            if span.num_tokens == 1:
                decode_rows.append((row, span))
            else:
                extend.append(_plan_extend(row, span, windows, page_size, device))
            row += span.num_tokens
        whole = len(decode_rows) == row
        return TorchPlan(
            decode=tuple(
                _plan_decode(group, windows, page_size, device, whole=whole and len(group) == row)
                for group in _similar_lengths(decode_rows)
            ),
            extend=tuple(extend),
        )

    def run(self, plan: TorchPlan, q_TNH: torch.Tensor, kv: LayerKV, spec: AttentionSpec) -> torch.Tensor:
        if len(plan.decode) == 1 and plan.decode[0].covers(q_TNH):
            return _run_decode(plan.decode[0], q_TNH, kv, spec, self._scratch)
        if not plan.decode and len(plan.extend) == 1 and plan.extend[0].num_rows == q_TNH.shape[0]:
            return _run_extend(plan.extend[0], q_TNH, kv, spec, self._scratch)
        out_TNH = torch.zeros_like(q_TNH)
        for group in plan.decode:
            out_TNH[group.rows_B] = _run_decode(group, q_TNH[group.rows_B], kv, spec, self._scratch)
        for item in plan.extend:
            rows = slice(item.first_row, item.first_row + item.num_rows)
            out_TNH[rows] = _run_extend(item, q_TNH[rows], kv, spec, self._scratch)
        return out_TNH


class ReferenceBackend(AttentionBackend):
    """The contract's reference as a backend: slow, exact, serves everything."""

    name = "reference"

    @classmethod
    def refuses(cls, signature: Signature) -> str | None:
        return None

    def plan(
        self, spans: Sequence[Span], *, page_size: int, windows: Sequence[int], device: torch.device
    ) -> tuple[Span, ...]:
        return tuple(Span(span.start, span.num_tokens, tuple(span.page_ids)) for span in spans)

    def run(
        self, plan: tuple[Span, ...], q_TNH: torch.Tensor, kv: LayerKV, spec: AttentionSpec
    ) -> torch.Tensor:
        return paged_attention(q_TNH, kv.k_NPSH, kv.v_NPSH, plan, spec.scale, spec.window, spec.soft_cap)


def _similar_lengths(rows: list[tuple[int, Span]]) -> list[list[tuple[int, Span]]]:
    """Groups whose longest member has at most twice the pages of the shortest, so that padding stays small."""
    if not rows:
        return []
    most = max(len(span.page_ids) for _, span in rows)
    least = min(len(span.page_ids) for _, span in rows)
    if most <= max(2 * least, 4):
        return [rows]
    long = [item for item in rows if 2 * len(item[1].page_ids) > most]
    short = [item for item in rows if 2 * len(item[1].page_ids) <= most]
    return [long, *_similar_lengths(short)]


def _plan_decode(
    rows: list[tuple[int, Span]], windows: Sequence[int], page_size: int, device: torch.device, *, whole: bool
) -> _DecodeGroup:
    most = max(len(span.page_ids) for _, span in rows)
    table = [[*span.page_ids, *([span.page_ids[0]] * (most - len(span.page_ids)))] for _, span in rows]
    lengths_B1 = torch.tensor([[span.num_kv_tokens] for _, span in rows], device=device)
    key_L = torch.arange(most * page_size, device=device)
    bias = {}
    for window in windows:
        hidden_BL = key_L >= lengths_B1
        if window:
            hidden_BL |= key_L < lengths_B1 - window
        zeros = torch.zeros(hidden_BL.shape, device=device)
        bias[window] = zeros.masked_fill_(hidden_BL, float("-inf")).unsqueeze(1)
    row_index = slice(0, len(rows)) if whole else torch.tensor([row for row, _ in rows], device=device)
    return _DecodeGroup(row_index, torch.tensor(table, device=device), bias)


def _plan_extend(
    row: int, span: Span, windows: Sequence[int], page_size: int, device: torch.device
) -> _ExtendItem:
    num_keys = span.num_kv_tokens
    pages = list(span.page_ids)[: -(-num_keys // page_size)]
    seen: dict[int, torch.Tensor | None] = {}
    for window in windows:
        if span.start == 0 and (not window or window >= num_keys):
            seen[window] = None
            continue
        position_T1 = torch.arange(span.start, num_keys, device=device)[:, None]
        key_L = torch.arange(num_keys, device=device)
        mask_TL = key_L <= position_T1
        if window:
            mask_TL &= key_L > position_T1 - window
        seen[window] = mask_TL
    return _ExtendItem(row, span.num_tokens, num_keys, torch.tensor(pages, device=device), seen)


def _run_decode(
    group: _DecodeGroup, q_BNH: torch.Tensor, kv: LayerKV, spec: AttentionSpec, scratch: _Scratch
) -> torch.Tensor:
    num_kv_heads, _, page_size, head_dim = kv.k_NPSH.shape
    batch, num_pages = group.pages_BP.shape
    pages = group.pages_BP.flatten()
    shape = (num_kv_heads, batch, num_pages * page_size, head_dim)
    k_KBLH = scratch.gather("k", kv.k_NPSH, pages).view(shape)
    v_KBLH = scratch.gather("v", kv.v_NPSH, pages).view(shape)
    q_KBGH = (q_BNH.float() * spec.scale).unflatten(1, (num_kv_heads, -1)).transpose(0, 1)
    # In float32 whatever the pool holds: a score of 20 rounded to bfloat16 would move its weight by 8 percent.
    scores_KBGL = torch.matmul(q_KBGH, k_KBLH.float().transpose(2, 3)).add_(group.bias_B1L[spec.window])
    weights_KBGL = torch.softmax(scores_KBGL, dim=-1).to(v_KBLH.dtype)
    return torch.matmul(weights_KBGL, v_KBLH).transpose(0, 1).flatten(1, 2).to(q_BNH.dtype)


def _run_extend(
    item: _ExtendItem, q_TNH: torch.Tensor, kv: LayerKV, spec: AttentionSpec, scratch: _Scratch
) -> torch.Tensor:
    k_1KLH, v_1KLH = (
        scratch.gather(use, pool, item.pages_P).flatten(1, 2)[None, :, : item.num_keys]
        for use, pool in (("k", kv.k_NPSH), ("v", kv.v_NPSH))
    )
    mask_TL = item.seen_TL[spec.window]
    out_1NTH = torch.nn.functional.scaled_dot_product_attention(
        q_TNH.to(k_1KLH.dtype).transpose(0, 1)[None],
        k_1KLH,
        v_1KLH,
        attn_mask=mask_TL,
        is_causal=mask_TL is None,
        scale=spec.scale,
        enable_gqa=True,
    )
    return out_1NTH[0].transpose(0, 1).to(q_TNH.dtype)
