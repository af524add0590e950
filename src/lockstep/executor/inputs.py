"""From a plan to what the model reads.

Shapes: T rows of the step, B slices, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lockstep.attention.spans import Spans, Stage
from lockstep.core.step import StepPlan
from lockstep.executor.sequences import NOBODY, SequenceTable

PADDING = (0, 0, -1, NOBODY, NOBODY)
"""A row that stands for nobody: a token that every model has, stored nowhere."""


@dataclass(frozen=True, slots=True)
class StepRows:
    """Five facts of each row of a step, int64, on the device.

    Its token, or 0; its place in its sequence; its slot in the KV pool; the sequence whose last token it adds to the
    first (see LastTokens), or nobody; the sequence that it belongs to.
    """

    facts_5T: torch.Tensor

    @property
    def token_ids_T(self) -> torch.Tensor:
        return self.facts_5T[0]

    @property
    def positions_T(self) -> torch.Tensor:
        return self.facts_5T[1]

    @property
    def slots_T(self) -> torch.Tensor:
        return self.facts_5T[2]

    @property
    def sources_T(self) -> torch.Tensor:
        return self.facts_5T[3]

    @property
    def owners_T(self) -> torch.Tensor:
        return self.facts_5T[4]


def padding_rows(num_rows: int, device: torch.device) -> StepRows:
    """Rows of nobody, in memory that later steps are written to."""
    return StepRows(torch.tensor(PADDING, device=device).repeat(num_rows, 1).T.contiguous())


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step on the host: the facts of its rows, as StepRows has them, and its slices in the plan's order.

    `owner_B` is the slot of each slice's sequence, `first_row_B` its first row, `samples_B` whether its last decides.
    """

    facts_5T: np.ndarray
    spans: Spans
    owner_B: np.ndarray
    first_row_B: np.ndarray
    samples_B: np.ndarray

    @property
    def last_row_B(self) -> np.ndarray:
        return self.first_row_B + self.spans.num_tokens_B - 1

    @property
    def num_rows(self) -> int:
        """Rows that are no padding."""
        return int(self.spans.num_tokens_B.sum())


class LastTokens:
    """The token that each running sequence sampled last, on the device, where the next step finds it.

    Nobody's is always 0, so that a row's token is the one that the host knows plus that of its source.
    """

    def __init__(self, max_sequences: int, device: torch.device) -> None:
        self._ids_S = torch.zeros(max_sequences + 1, dtype=torch.int64, device=device)

    def resolve(self, rows: StepRows) -> torch.Tensor:
        """The token of every row [T]."""
        return self._ids_S.index_select(0, rows.sources_T) + rows.token_ids_T

    def keep(self, owners_R: torch.Tensor, token_ids_R: torch.Tensor) -> None:
        """These sequences sampled these tokens."""
        self._ids_S.index_copy_(0, owners_R, token_ids_R)


def build_inputs(
    plan: StepPlan,
    sequences: SequenceTable,
    page_size: int,
    *,
    num_rows: int | None = None,
    stage: Stage = torch.from_numpy,
) -> StepInputs:
    """Rows of all slices, one after the other, in the plan's order, then padding up to `num_rows` if given."""
    owner_B = sequences.slots(plan.slices)
    start_B = np.array([piece.start for piece in plan.slices], dtype=np.int64)
    num_tokens_B = np.array([piece.num_tokens for piece in plan.slices], dtype=np.int64)
    end_B = num_tokens_B.cumsum()
    first_row_B = end_B - num_tokens_B
    total = int(num_tokens_B.sum())

    slice_T = np.arange(len(owner_B)).repeat(num_tokens_B)
    owner_T = owner_B[slice_T]
    position_T = np.arange(total) - (first_row_B - start_B)[slice_T]
    page_T, at_T = np.divmod(position_T, page_size)
    facts_5T = np.empty((5, max(total, num_rows or 0)), dtype=np.int64)
    facts_5T[:, total:] = np.array(PADDING)[:, None]
    facts_5T[0, :total] = 0
    facts_5T[1, :total] = position_T
    facts_5T[2, :total] = sequences.page_ids_SP[owner_T, page_T].astype(np.int64) * page_size + at_T
    facts_5T[3, :total] = np.where(position_T < sequences.num_known_S[owner_T], NOBODY, owner_T)
    facts_5T[4, :total] = owner_T
    for index in np.nonzero(start_B < sequences.num_known_S[owner_B])[0]:
        row, start, count = first_row_B[index], start_B[index], num_tokens_B[index]
        token_ids = sequences[plan.slices[index].seq_id].token_ids
        facts_5T[0, row : row + count] = token_ids[start : start + count]

    most_pages = -(-int((start_B + num_tokens_B).max(initial=0)) // page_size)
    samples_B = np.array([piece.samples for piece in plan.slices], dtype=bool)
    num_wanted_B = np.where(sequences.is_special_S[owner_B], num_tokens_B, samples_B)
    page_ids_BP = sequences.page_ids_SP[owner_B, :most_pages]
    spans = Spans(start_B, num_tokens_B, page_ids_BP, page_size, stage, num_wanted_B)
    return StepInputs(facts_5T, spans, owner_B, first_row_B, samples_B)
