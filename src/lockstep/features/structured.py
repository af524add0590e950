"""Structured output: logits of constrained sequences are masked by their grammars."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lockstep.core.step import SequenceStart
from lockstep.features.grammar import GrammarCompiler, GrammarState, cannot_go_on

_BITS = 32
_ALL = -1  # every bit of a word


class StructuredOutput:
    """The sampler hook that holds each sequence with a grammar to it.

    A grammar can fail late (it outgrows the parser's limits while it runs), so `start` and `accept` may raise
    InvalidRequest; the sequence is then lost, the others are not touched.
    """

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._states: dict[int, GrammarState] = {}

    def start(self, seq_id: int, start: SequenceStart) -> None:
        """Prepares a sequence; tokens generated before a preemption are replayed into its grammar."""
        grammar = start.params.grammar
        if grammar is None:
            return
        state = self._compiler.start(grammar)
        for token_id in start.token_ids[start.num_prompt_tokens :]:
            _advance(state, token_id)
        self._states[seq_id] = state

    def end(self, seq_id: int) -> None:
        """Forgets a sequence."""
        self._states.pop(seq_id, None)

    def active(self, seq_ids: Sequence[int]) -> bool:
        """True when one of these sequences has a grammar."""
        return not self._states.keys().isdisjoint(seq_ids)

    def mask(self, seq_ids: Sequence[int], logits: torch.Tensor) -> None:
        """Sets, in place, the logits [rows, vocab] of what a row's grammar forbids to minus infinity."""
        if not self.active(seq_ids):
            return
        vocab_size = logits.shape[1]
        words = np.full((len(seq_ids), -(-vocab_size // _BITS)), _ALL, dtype=np.int32)
        for seq_id, row_words in zip(seq_ids, words, strict=True):
            if (state := self._states.get(seq_id)) is not None:
                state.fill_mask(row_words)
        allowed = np.unpackbits(words.view(np.uint8), axis=1, count=vocab_size, bitorder="little")
        logits.masked_fill_(torch.from_numpy(allowed == 0).to(logits.device), float("-inf"))

    def accept(self, seq_id: int, token_id: int) -> bool:
        """Moves a sequence past a sampled token; True when nothing but an end token may follow."""
        state = self._states.get(seq_id)
        if state is None:
            return False
        _advance(state, token_id)
        return state.complete


def _advance(state: GrammarState, token_id: int) -> None:
    # A token may be allowed and yet leave the grammar over its limits.
    if not state.accept(token_id) or state.error:
        raise cannot_go_on(token_id, state.error)
