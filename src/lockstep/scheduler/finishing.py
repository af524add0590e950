"""When a sequence is done."""

from __future__ import annotations

from lockstep.core.request import FinishReason
from lockstep.core.step import TokenLogprob, TokenSlice
from lockstep.scheduler.sequence import Sequence


def take_tokens(
    sequence: Sequence, token_ids: tuple[int, ...], complete: bool
) -> tuple[int, FinishReason | None, int | None]:
    """Appends new tokens up to the one that ends the sequence, if any, and drops the rest.

    Returns how many were taken, the reason to finish or None, and the end token or stop id that caused it. Such
    a token counts only when `min_tokens` tokens precede it. `complete`, which is said after the last token,
    always finishes.
    """
    for num_taken, token_id in enumerate(token_ids, 1):
        may_stop = sequence.num_generated >= sequence.min_tokens
        sequence.token_ids.append(token_id)
        sequence.num_tokens += 1
        if token_id in sequence.stop_token_ids and may_stop:
            return num_taken, "stop", token_id
        if len(sequence.token_ids) >= sequence.max_tokens:
            is_complete = complete and num_taken == len(token_ids)
            return num_taken, "stop" if is_complete else "length", None
    return len(token_ids), "stop" if complete else None, None


def new_prompt_logprobs(
    sequence: Sequence, piece: TokenSlice, found: tuple[TokenLogprob, ...]
) -> tuple[TokenLogprob, ...]:
    """Those of the slice's prompt log-probabilities that were not reported before a preemption."""
    if not found:
        return ()
    num_known = max(0, sequence.num_prompt_rows_reported - piece.start)
    sequence.num_prompt_rows_reported = max(sequence.num_prompt_rows_reported, piece.start + len(found))
    return found[num_known:]
