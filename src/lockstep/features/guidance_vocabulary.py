"""A model's vocabulary as the llguidance library wants to see it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from lockstep.core.errors import InvalidRequest
from lockstep.tokenizer.tokenizer import Tokenizer

# Text put before the wanted one so that a tokenizer which marks the start of a text marks that instead.
_LEADS = ("", "\n")


class GuidanceVocabulary:
    """The token table that llguidance reads, taken byte for byte from the tokenizer that decodes answers.

    The attribute names are llguidance's. Raises InvalidRequest when the model has no end token, since then no
    answer could be ended.
    """

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.require_text("structured output")
        if not tokenizer.eos_token_ids:
            raise InvalidRequest(
                "structured output needs a model that declares an end token; this one has none"
            )
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_ids[0]
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted(tokenizer.special_token_ids)
        self.tokens: Sequence[bytes] = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]

    def __call__(self, text: str) -> list[int]:
        """Ids whose bytes are exactly those of `text` in the middle of an answer, as the model would cut it.

        Tokenizers that normalise cannot express some texts; those are cut greedily.
        """
        wanted = text.encode()
        for lead in _LEADS:
            ids = self._tokenizer.encode(lead + text, add_special_tokens=False, parse_special=False)
            if (tail := self._tail_spelling(ids, wanted)) is not None:
                return tail
        return self._greedy(wanted)

    def _tail_spelling(self, ids: list[int], wanted: bytes) -> list[int] | None:
        """The last ids, if some of them spell exactly `wanted`."""
        start, missing = len(ids), len(wanted)
        while start and missing > 0:
            start -= 1
            missing -= len(self.tokens[ids[start]])
        tail = ids[start:]
        return tail if b"".join([self.tokens[i] for i in tail]) == wanted else None

    def _greedy(self, data: bytes) -> list[int]:
        ids = []
        while data:
            longest = min(len(data), self._longest)
            size = next((n for n in range(longest, 0, -1) if data[:n] in self._id_of), 0)
            if size == 0:
                break
            ids.append(self._id_of[data[:size]])
            data = data[size:]
        return ids

    @cached_property
    def _id_of(self) -> dict[bytes, int]:
        special = self._tokenizer.special_token_ids
        return {data: i for i, data in enumerate(self.tokens) if data and i not in special}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._id_of), default=0)
