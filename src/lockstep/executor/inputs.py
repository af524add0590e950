"""From a plan to tensors.

Shapes: T rows of the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lockstep.attention.backend import Span
from lockstep.core.step import StepPlan
from lockstep.executor.sequences import SequenceTable


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What the model reads, int64: each row's token, its place in its sequence and its slot in the KV pool.

    `first_rows` holds the first row of each slice, in the plan's order.
    """

    rows_3T: torch.Tensor
    spans: list[Span]
    first_rows: list[int]

    @property
    def token_ids_T(self) -> torch.Tensor:
        return self.rows_3T[0]

    @property
    def positions_T(self) -> torch.Tensor:
        return self.rows_3T[1]

    @property
    def slots_T(self) -> torch.Tensor:
        return self.rows_3T[2]


PADDING = (0, 0, -1)
"""Token, position and slot of a row that stands for nobody: a token that every model has, stored nowhere."""


def build_inputs(
    plan: StepPlan,
    sequences: SequenceTable,
    page_size: int,
    device: torch.device,
    *,
    num_rows: int | None = None,
) -> StepInputs:
    """Rows of all slices, one after the other, in the plan's order, then padding up to `num_rows` if given."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    spans: list[Span] = []
    first_rows: list[int] = []
    for piece in plan.slices:
        state = sequences[piece.seq_id]
        first_rows.append(len(token_ids))
        end = piece.start + piece.num_tokens
        pages = state.page_ids
        if piece.num_tokens == 1:
            token_ids.append(state.token_ids[piece.start])
            positions.append(piece.start)
            slots.append(pages[piece.start // page_size] * page_size + piece.start % page_size)
        else:
            token_ids.extend(state.token_ids[piece.start : end])
            positions.extend(range(piece.start, end))
            slots.extend(pages[at // page_size] * page_size + at % page_size for at in range(piece.start, end))
        spans.append(Span(piece.start, piece.num_tokens, pages))
    num_padding = max(0, (num_rows or 0) - len(token_ids))
    columns = zip((token_ids, positions, slots), PADDING, strict=True)
    packed = torch.tensor([values + [padding] * num_padding for values, padding in columns], dtype=torch.int64)
    if packed.device != device:
        packed = packed.pin_memory().to(device, non_blocking=True)
    return StepInputs(packed, spans, first_rows)
