"""From a plan to what the model reads.

Shapes: T rows of the step, R of them whose hidden state is read, B slices, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lockstep.attention.spans import PLAIN, Spans, Stager
from lockstep.core.step import StepPlan, TokenSlice
from lockstep.executor.sequences import NOBODY, SequenceTable
from lockstep.layers.tokens import Tokens

PADDING = (0, 0, -1, NOBODY, NOBODY)
"""A row that stands for nobody: a token that every model has, stored nowhere."""

_PADDING_51 = np.array(PADDING)[:, None]
_ALIGNED = 16
"""Counts of keys take multiples of this many entries, so that what lies behind them is aligned for any kernel."""


class StepRows:
    """Six facts of each row of a step, on the device, in one piece of memory so that one copy fills it.

    int64: its token, or 0; its place in its sequence; its slot in the KV pool; the sequence whose last token it adds
    to the first (see LastTokens), or nobody; the sequence that it belongs to. And int32, as kernels of attention read
    it: how many keys it sees, itself included; padding sees none.
    """

    def __init__(self, memory: torch.Tensor, num_rows: int) -> None:
        words = _key_words(num_rows)
        self.memory = memory
        self.num_keys_T = memory[:words].view(torch.int32)[:num_rows]
        facts = memory[words:].view(5, num_rows).unbind()
        self.token_ids_T, self.positions_T, self.slots_T, self.sources_T, self.owners_T = facts

    def fill(self, inputs: StepInputs) -> None:
        """Copies the rows of a step of the same size, padding included, to this memory, in stream order."""
        inputs.spans.stager.fill(self.memory, inputs.memory)


def padding_rows(num_rows: int, device: torch.device) -> StepRows:
    """Rows of nobody, in memory that later steps are written to."""
    memory, num_keys_T, facts_5T = _host_rows(num_rows)
    num_keys_T[:] = 0
    facts_5T[:] = _PADDING_51
    return StepRows(torch.from_numpy(memory).to(device), num_rows)


@dataclass(slots=True)
class StepInputs:
    """A step on the host: what StepRows holds, and its slices in the plan's order. Nobody writes to it.

    `num_keys_T` and `facts_5T` are the parts of `memory`, padding included, which `num_rows` leaves out. `owner_B` is
    the slot of each slice's sequence, `first_row_B` its first row, `samples_B` whether its last decides, `is_whole_B`
    whether the hidden state of all its rows is wanted.
    """

    memory: np.ndarray
    num_keys_T: np.ndarray
    facts_5T: np.ndarray
    num_rows: int
    spans: Spans
    owner_B: np.ndarray
    first_row_B: np.ndarray
    samples_B: np.ndarray
    is_whole_B: np.ndarray

    @property
    def last_row_B(self) -> np.ndarray:
        return self.first_row_B + self.spans.num_tokens_B - 1

    @property
    def wanted_row_R(self) -> np.ndarray | None:
        """int64: the last rows of the slices that sample, in their order, or one row where none does.

        None where all rows of some slice are wanted: then all of the step are computed to the end.
        """
        if self.is_whole_B.any():
            return None
        row_R = self.last_row_B[self.samples_B]
        return row_R if len(row_R) else np.zeros(1, dtype=np.int64)


def pays_to_select(num_wanted: int, num_rows: int) -> bool:
    """True where rows that nobody reads are so many that leaving them out saves more than it costs to pick others."""
    return 2 * num_wanted <= num_rows


class LastTokens:
    """The token that each running sequence sampled last, on the device, where the next step finds it.

    Nobody's is always 0, so that a row's token is the one that the host knows plus that of its source.
    """

    def __init__(self, max_sequences: int, device: torch.device) -> None:
        self.ids_S = torch.zeros(max_sequences + 1, dtype=torch.int64, device=device)
        self._nobody = self.ids_S[NOBODY]

    def of(self, rows: StepRows) -> Tokens:
        """The tokens of these rows."""
        return Tokens(rows.token_ids_T, rows.sources_T, self.ids_S)

    def keep(self, owners_R: torch.Tensor, token_ids_R: torch.Tensor) -> None:
        """These sequences sampled these tokens."""
        self.ids_S.index_copy_(0, owners_R, token_ids_R)

    def keep_padded(self, owners_T: torch.Tensor, token_ids_T: torch.Tensor) -> None:
        """The same where some of the rows are nobody's: their tokens are forgotten."""
        self.keep(owners_T, token_ids_T)
        self._nobody.zero_()


def build_inputs(
    plan: StepPlan,
    sequences: SequenceTable,
    page_size: int,
    *,
    num_rows: int | None = None,
    stager: Stager = PLAIN,
    wants_all: bool = False,
) -> StepInputs:
    """Rows of all slices, one after the other, in the plan's order, then padding up to `num_rows` if given.

    `wants_all`: the hidden states of all rows are wanted, whatever the sequences ask for.
    """
    slices = plan.slices
    owner_B = sequences.slots(slices)
    start_B = np.array([piece.start for piece in slices], dtype=np.int64)
    num_tokens = [piece.num_tokens for piece in slices]
    num_tokens_B = np.array(num_tokens, dtype=np.int64)
    samples_B = np.array([piece.samples for piece in slices], dtype=bool)
    total = sum(num_tokens)
    if total == len(slices):
        # Single tokens, as in most steps: a slice is a row.
        first_row_B, owner_T, position_T = np.arange(total), owner_B, start_B
    else:
        first_row_B = num_tokens_B.cumsum() - num_tokens_B
        slice_T = np.arange(len(slices)).repeat(num_tokens_B)
        owner_T, position_T = owner_B[slice_T], np.arange(total) - (first_row_B - start_B)[slice_T]

    memory, num_keys_T, facts_5T = _host_rows(max(total, num_rows or 0))
    num_keys_T[total:] = 0
    facts_5T[:, total:] = _PADDING_51
    num_keys_T[:total] = position_T + 1
    page_T = position_T // page_size
    facts_5T[0, :total] = 0
    facts_5T[1, :total] = position_T
    # A slot is its page's first one and its place there, which the position has beyond full pages.
    facts_5T[2, :total] = (sequences.page_ids_SP[owner_T, page_T] - page_T) * page_size + position_T
    facts_5T[3:, :total] = owner_T
    is_known_B = start_B < sequences.num_known_S[owner_B]
    if np.count_nonzero(is_known_B):
        facts_5T[3, :total][position_T < sequences.num_known_S[owner_T]] = NOBODY
        _fill_known(facts_5T[0], sequences, slices, is_known_B, first_row_B)

    most_pages = -(-int((start_B + num_tokens_B).max(initial=0)) // page_size)
    is_whole_B = sequences.is_special_S[owner_B] | wants_all
    num_wanted_B = np.where(is_whole_B, num_tokens_B, samples_B)
    page_ids_BP = sequences.page_ids_SP[owner_B, :most_pages]
    spans = Spans(start_B, num_tokens_B, page_ids_BP, page_size, stager, num_wanted_B)
    return StepInputs(memory, num_keys_T, facts_5T, total, spans, owner_B, first_row_B, samples_B, is_whole_B)


def _fill_known(
    token_ids_T: np.ndarray,
    sequences: SequenceTable,
    slices: Sequence[TokenSlice],
    is_known_B: np.ndarray,
    first_row_B: np.ndarray,
) -> None:
    """Writes the tokens of the slices whose ids the host has."""
    for index in np.nonzero(is_known_B)[0].tolist():
        piece, row = slices[index], first_row_B[index]
        token_ids = sequences[piece.seq_id].token_ids[piece.start : piece.start + piece.num_tokens]
        token_ids_T[row : row + piece.num_tokens] = token_ids


def _host_rows(num_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Memory for so many rows as StepRows reads it, and its parts: the counts of keys [T], and the five other facts."""
    words = _key_words(num_rows)
    memory = np.empty(words + 5 * num_rows, dtype=np.int64)
    return memory, memory[:words].view(np.int32)[:num_rows], memory[words:].reshape(5, num_rows)


def _key_words(num_rows: int) -> int:
    """Words of 8 bytes that the counts of keys take."""
    return -(-num_rows // _ALIGNED) * _ALIGNED // 2
