"""An executor that counts and computes nothing: for the scheduler, the protocol and the server, with no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lockstep.core.step import Landed, SequenceResult, StepPlan, StepResult, TokenSlice
from lockstep.executor.draws import uniforms


class NullExecutor:
    """Answers every plan with tokens that depend on the request's seed and the position alone."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._seeds: dict[int, int] = {}
        self._embeds: dict[int, int] = {}

    def submit(self, plan: StepPlan) -> Landed:
        """Counts, and has the answer."""
        for seq_id in plan.ended:
            self._seeds.pop(seq_id, None)
            self._embeds.pop(seq_id, None)
        for start in plan.started:
            self._seeds[start.seq_id] = (start.params.seed or 0) % 2**64
            if start.pooling is not None:
                self._embeds[start.seq_id] = start.num_prompt_tokens
        results = [
            SequenceResult(piece.seq_id, (token_id,)) if piece.samples else self._without_token(piece)
            for piece, token_id in zip(plan.slices, self._tokens(plan.slices), strict=True)
        ]
        return Landed(StepResult(plan.step_id, tuple(results)))

    def record_next(self) -> bool:
        """There is nothing to record."""
        return False

    def _tokens(self, slices: Sequence[TokenSlice]) -> list[int]:
        """The token that follows each slice."""
        seeds = np.array([self._seeds[piece.seq_id] for piece in slices], dtype=np.uint64)
        positions = np.array([piece.start + piece.num_tokens for piece in slices], dtype=np.int64)
        token_ids: list[int] = (uniforms(seeds, positions) * self._vocab_size).astype(np.int64).tolist()
        return token_ids

    def _without_token(self, piece: TokenSlice) -> SequenceResult:
        is_whole = self._embeds.get(piece.seq_id) == piece.start + piece.num_tokens
        return SequenceResult(piece.seq_id, embedding=(1.0,) if is_whole else None)
