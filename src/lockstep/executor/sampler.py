"""Chooses the next token of each row.

Shapes: R rows, V vocabulary, D rows that draw, E of them rounded up, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lockstep.core.step import SequenceStart
from lockstep.executor.draws import uniforms
from lockstep.executor.edits import ScoreEdits
from lockstep.executor.hooks import SamplerHook
from lockstep.executor.transfers import Transfers
from lockstep.ops.argmax.kernels.torch import KERNELS as STOCK_ARGMAX
from lockstep.ops.contract import Kernel
from lockstep.ops.top_k_top_p_sample.kernels.torch import KERNELS as STOCK_SAMPLE
from lockstep.ops.top_k_top_p_sample.kernels.torch import sample_unfiltered

_NEVER = np.iinfo(np.int64).max
_ALIGNED = 16
"""Columns begin at multiples of this many entries, so that one compiled kernel serves any number of rows."""


@dataclass(frozen=True, slots=True)
class SamplingKernels:
    """Kernels of the operators argmax and top_k_top_p_sample. Left out, those of torch, which run anywhere.

    `bare_argmax` serves scores that nobody edits, in the dtype that the model gives them in. So does `choose_greedy`,
    which does what is done with the best of them, too; None where there is no kernel for all of it.
    """

    argmax: Kernel = STOCK_ARGMAX[0]
    sample: Kernel = STOCK_SAMPLE[0]
    bare_argmax: Kernel = STOCK_ARGMAX[0]
    choose_greedy: Kernel | None = None

    def argmax_of(self, logits_RV: torch.Tensor) -> Kernel:
        """The one that serves these scores."""
        return self.argmax if logits_RV.dtype == torch.float32 else self.bare_argmax


STOCK = SamplingKernels()


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which rows of scores belong to whom: sequences by id and slot, and the position of the token to be chosen."""

    seq_ids: Sequence[int]
    slot_R: np.ndarray
    position_R: np.ndarray


@dataclass(frozen=True, slots=True)
class Chosen:
    """Tokens int64 [R], and the best score of each row, from which `explain` tells whether there was a choice."""

    token_ids_R: torch.Tensor
    best_R: torch.Tensor

    def packed(self) -> torch.Tensor:
        """Both as one tensor, int32 [2, R], for one copy to the host: see `unpack`."""
        shape, device = (2, len(self.token_ids_R)), self.token_ids_R.device
        packed_2R = torch.empty(shape, dtype=torch.int32, device=device)
        packed_2R[0].copy_(self.token_ids_R)
        packed_2R[1].view(torch.float32).copy_(self.best_R)
        return packed_2R


def unpack(packed_2R: np.ndarray, count: int) -> tuple[list[int], list[float]]:
    """The first `count` tokens, and their best scores in float32, of what `Chosen.packed` gave."""
    token_ids_R, best_R = packed_2R[:, :count]
    return token_ids_R.tolist(), best_R.view(np.float32).tolist()


class Sampler:
    """Penalties, bias, bans, hooks, then greedy or seeded choice, per row and whatever shares the batch.

    `eos_token_ids` are banned, like a request's stop ids, until its `min_tokens` are reached. Nothing here
    waits for the device, unless a hook does, or filters meet a kernel that asks the host.
    """

    def __init__(
        self,
        max_sequences: int,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        transfers: Transfers,
        hooks: Sequence[SamplerHook] = (),
        kernels: SamplingKernels = STOCK,
    ) -> None:
        self._vocab_size = vocab_size
        self._transfers = transfers
        self._hooks = tuple(hooks)
        self._kernels = kernels
        self._edits = ScoreEdits(max_sequences, eos_token_ids, transfers)
        self._draws_S = np.zeros(max_sequences + 1, dtype=bool)
        self._bare_from_S = np.zeros(max_sequences + 1, dtype=np.int64)
        """Positions from which on a sequence's tokens are the best of its scores as they are."""
        self._seed_S = np.zeros(max_sequences + 1, dtype=np.uint64)
        self._filters_S4 = np.zeros((max_sequences + 1, 4), dtype=np.float64)
        self._is_filtered_S = np.zeros(max_sequences + 1, dtype=bool)

    def start(self, slot: int, start: SequenceStart) -> None:
        """A sequence enters in this slot, for the first time or after a preemption."""
        params = start.params
        self._draws_S[slot] = not params.greedy
        self._seed_S[slot] = (params.seed or 0) % 2**64
        filters = (params.temperature, params.top_p, params.min_p, params.top_k)
        # top_k 1 is the greedy choice: beside rows that draw, such a row may pass through the same kernel.
        self._filters_S4[slot] = (1, 1, 0, 1) if params.greedy else filters
        self._is_filtered_S[slot] = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
        self._edits.start(slot, start, self._vocab_size)
        self._bare_from_S[slot] = self._edits.edited_until(slot) if params.greedy else _NEVER

    def end(self, slot: int) -> None:
        """The sequence of this slot left."""
        self._edits.end(slot)

    def is_bare(self, sampling: Sampling) -> bool:
        """True when `choose` gives the best of the scores as they are and takes note of nothing."""
        if np.count_nonzero(sampling.position_R < self._bare_from_S[sampling.slot_R]):
            return False
        return not any(hook.active(sampling.seq_ids) for hook in self._hooks)

    def choose(self, logits_RV: torch.Tensor, sampling: Sampling) -> Chosen:
        """One token a row, in stream order. May overwrite `logits_RV`; all but a bare greedy choice is in float32."""
        hooks = [hook for hook in self._hooks if hook.active(sampling.seq_ids)]
        draws = self._draws_S[sampling.slot_R].any()
        if hooks or draws or self._edits.any(sampling.slot_R, sampling.position_R):
            logits_RV = logits_RV.float()
        argmax = self._kernels.argmax_of(logits_RV)
        self._edits.apply(logits_RV, sampling.slot_R, sampling.position_R)
        for hook in hooks:
            hook.mask(sampling.seq_ids, logits_RV)
        best_R, token_ids_R = argmax.function(logits_RV)
        if draws:
            token_ids_R = self._draw(logits_RV, sampling, token_ids_R)
        self._edits.count(sampling.slot_R, token_ids_R)
        return Chosen(token_ids_R, best_R)

    def _draw(self, logits_RV: torch.Tensor, sampling: Sampling, token_ids_R: torch.Tensor) -> torch.Tensor:
        """The greedy choice, replaced by a seeded draw in the rows that ask for one."""
        sample = self._kernels.sample
        if not sample.asks_host:
            drawn_R: torch.Tensor = sample.function(
                logits_RV, *self._wanted(sampling.slot_R, sampling.position_R)
            )
            return drawn_R
        # The rows that such a kernel need not see are kept from it: nobody is to wait for those without filters.
        draws_R, is_filtered_R = self._draws_S[sampling.slot_R], self._is_filtered_S[sampling.slot_R]
        for is_drawn_R, draw in (
            (draws_R & ~is_filtered_R, sample_unfiltered),
            (draws_R & is_filtered_R, sample.function),
        ):
            rows = np.nonzero(is_drawn_R)[0]
            if len(rows) == 0:
                continue
            wanted = self._wanted(sampling.slot_R[rows], sampling.position_R[rows])
            if len(rows) == len(token_ids_R):
                token_ids_R = draw(logits_RV, *wanted)
            else:
                row_D = self._transfers.upload(rows)
                drawn_D = draw(logits_RV.index_select(0, row_D), *wanted)
                token_ids_R = token_ids_R.index_copy(0, row_D, drawn_D)
        return token_ids_R

    def _wanted(self, slot_D: np.ndarray, position_D: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Temperature, top_k, top_p, min_p and draw of these rows, each [D], in one copy."""
        count = len(slot_D)
        wide_4E = np.zeros((4, -(-count // _ALIGNED) * _ALIGNED))
        narrow_4E = wide_4E[2:].view(np.float32).reshape(4, -1)
        filters_4D = self._filters_S4[slot_D].T
        wide_4E[0, :count] = uniforms(self._seed_S[slot_D], position_D)
        wide_4E[1].view(np.int64)[:count] = filters_4D[3]
        narrow_4E[:3, :count] = filters_4D[:3]
        there_4E = self._transfers.upload(wide_4E)
        temperature_D, top_p_D, min_p_D, _ = there_4E[2:].view(torch.float32).view(4, -1)[:, :count]
        return temperature_D, there_4E[1].view(torch.int64)[:count], top_p_D, min_p_D, there_4E[0, :count]


def explain(best: float) -> str | None:
    """Why a row whose best score is this has no token; None when it has one."""
    if best - best == 0:
        return None
    if best == float("-inf"):
        return "no token is allowed here: the constraints on this request contradict each other"
    return "the model's scores are not numbers (NaN or infinite); check the weights and --dtype"
