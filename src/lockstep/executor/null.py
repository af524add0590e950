"""An executor that counts and computes nothing: for the scheduler, the protocol and the server, with no model."""

from __future__ import annotations

from lockstep.core.step import Landed, SequenceResult, StepPlan, StepResult
from lockstep.executor.draws import uniform


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
            self._seeds[start.seq_id] = start.params.seed or 0
            if start.pooling is not None:
                self._embeds[start.seq_id] = start.num_prompt_tokens
        results = []
        for piece in plan.slices:
            end = piece.start + piece.num_tokens
            result = SequenceResult(piece.seq_id)
            if piece.samples:
                token_id = int(uniform(self._seeds[piece.seq_id], end) * self._vocab_size)
                result = SequenceResult(piece.seq_id, token_ids=(token_id,))
            elif self._embeds.get(piece.seq_id) == end:
                result = SequenceResult(piece.seq_id, embedding=(1.0,))
            results.append(result)
        return Landed(StepResult(plan.step_id, tuple(results)))
