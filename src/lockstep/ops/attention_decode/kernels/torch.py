"""One batched product for sequences of similar lengths. Stock operators know no pages: keys are gathered first.

Shapes: B sequences, N query heads, K KV heads, G query heads of a KV head, H head dim, P pages, L keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lockstep.ops.attention_extend.kernels.torch import GatherRoom, refuses
from lockstep.ops.contract import Kernel


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """A row of q, and the keys that its sequence has in its pages."""

    row: int
    num_keys: int
    page_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows of similar lengths, padded to common pages.

    `rows_B` are their rows in q, a slice when they lie together from the first on. `hidden` maps a window to where
    there is padding, or a key before the window. Padding begins at `shortest` at the earliest; it may be no number.
    """

    rows_B: torch.Tensor | slice
    pages_BP: torch.Tensor
    hidden_B1L: dict[int, torch.Tensor]
    padding_BL1: torch.Tensor
    shortest: int

    def covers(self, num_rows: int) -> bool:
        """True when its rows are all of q, in order."""
        return isinstance(self.rows_B, slice) and self.rows_B.stop == num_rows


def plan_groups(
    rows: Sequence[DecodeRow], *, page_size: int, windows: Sequence[int], device: torch.device
) -> tuple[DecodeGroup, ...]:
    """What layers with these windows share of a step. Every row has a key."""
    return tuple(_plan_group(group, page_size, windows, device) for group in _similar_lengths(list(rows)))


def run_group(
    group: DecodeGroup,
    q_BNH: torch.Tensor,
    k_KPSH: torch.Tensor,
    v_KPSH: torch.Tensor,
    scale: float,
    window: int,
    room: GatherRoom,
) -> torch.Tensor:
    """out [B, N, H] of the group's own rows, in the dtype of q."""
    num_kv_heads, _, page_size, head_dim = k_KPSH.shape
    batch, num_pages = group.pages_BP.shape
    pages = group.pages_BP.flatten()
    shape = (num_kv_heads, batch, num_pages * page_size, head_dim)
    k_KBLH = room.gather("k", k_KPSH, pages).view(shape)
    v_KBLH = room.gather("v", v_KPSH, pages).view(shape)
    q_KBGH = (q_BNH.float() * scale).unflatten(1, (num_kv_heads, -1)).transpose(0, 1)
    # In float32 whatever the pool holds: a score of 20 rounded to bfloat16 would move its weight by 8 percent.
    scores_KBGL = torch.matmul(q_KBGH, k_KBLH.float().transpose(2, 3))
    scores_KBGL.masked_fill_(group.hidden_B1L[window], float("-inf"))
    weights_KBGL = torch.softmax(scores_KBGL, dim=-1).to(v_KBLH.dtype)
    # A weight of zero does not hide a value that is no number.
    v_KBLH[:, :, group.shortest :].masked_fill_(group.padding_BL1[:, group.shortest :], 0.0)
    return torch.matmul(weights_KBGL, v_KBLH).transpose(0, 1).flatten(1, 2).to(q_BNH.dtype)


def attention_decode(
    q_BNH: torch.Tensor,
    k_KPSH: torch.Tensor,
    v_KPSH: torch.Tensor,
    page_table_BP: torch.Tensor,
    num_keys_B: torch.Tensor,
    sinks_N: torch.Tensor | None,
    out_BNH: torch.Tensor,
    scale: float,
    window: int,
    soft_cap: float,
) -> None:
    """See the contract. Lengths are read on the host; a backend plans once for all layers instead."""
    room, page_size = GatherRoom(), k_KPSH.shape[2]
    rows = [
        DecodeRow(row, num_keys, pages[: -(-num_keys // page_size)])
        for row, (num_keys, pages) in enumerate(zip(num_keys_B.tolist(), page_table_BP.tolist(), strict=True))
        if num_keys
    ]
    out_BNH.zero_()
    for group in plan_groups(rows, page_size=page_size, windows=(window,), device=q_BNH.device):
        out_BNH[group.rows_B] = run_group(group, q_BNH[group.rows_B], k_KPSH, v_KPSH, scale, window, room)


def _similar_lengths(rows: list[DecodeRow]) -> list[list[DecodeRow]]:
    """Groups whose longest member has at most twice the pages of the shortest, so that padding stays small."""
    if not rows:
        return []
    most = max(len(row.page_ids) for row in rows)
    least = min(len(row.page_ids) for row in rows)
    if most <= max(2 * least, 4):
        return [rows]
    long = [row for row in rows if 2 * len(row.page_ids) > most]
    short = [row for row in rows if 2 * len(row.page_ids) <= most]
    return [long, *_similar_lengths(short)]


def _plan_group(
    rows: list[DecodeRow], page_size: int, windows: Sequence[int], device: torch.device
) -> DecodeGroup:
    most = max(len(row.page_ids) for row in rows)
    table = [[*row.page_ids, *([row.page_ids[0]] * (most - len(row.page_ids)))] for row in rows]
    lengths_B1 = torch.tensor([[row.num_keys] for row in rows], device=device)
    key_L = torch.arange(most * page_size, device=device)
    padding_BL, hidden = key_L >= lengths_B1, {}
    for window in windows:
        hidden_BL = padding_BL | (key_L < lengths_B1 - window) if window else padding_BL
        hidden[window] = hidden_BL.unsqueeze(1)
    together = all(row.row == index for index, row in enumerate(rows))
    row_index = slice(0, len(rows)) if together else torch.tensor([row.row for row in rows], device=device)
    shortest = min(row.num_keys for row in rows)
    pages_BP = torch.tensor(table, device=device)
    return DecodeGroup(row_index, pages_BP, hidden, padding_BL.unsqueeze(2), shortest)


KERNELS = (
    Kernel(
        op="attention_decode",
        provider="torch",
        function=attention_decode,
        refuses=refuses,
        verified_on=("cpu", "NVIDIA H100"),
        asks_host=True,
    ),
)
