"""Token ids to text as they arrive."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from lockstep.tokenizer.vocabulary import Vocabulary

_LONGEST_PARTIAL_CHARACTER_BYTES = 3


class IncrementalDetokenizer:
    """Turns a growing list of ids into text that never has to be taken back.

    The texts of all `push` calls and of `finish`, joined, equal the text of all ids at once. `prompt_ids` are
    the tokens before the first pushed one: they decide whether a leading space is SentencePiece's prefix or
    real, and may hold the first bytes of a character that the pushed tokens complete.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        skip_special_tokens: bool = True,
        strips_leading_space: bool = False,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self._vocabulary = vocabulary
        self._hidden = vocabulary.special if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        prompt_tail = self._last_bytes(prompt_ids)
        self._utf8.decode(prompt_tail)
        self._drops_space = strips_leading_space and not prompt_tail

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these ids settle; it never ends inside a character."""
        data = b"".join([self._vocabulary.token_bytes(i) for i in token_ids if i not in self._hidden])
        if self._drops_space and data:
            self._drops_space = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What is left: U+FFFD for a character whose last bytes never came, else nothing."""
        return self._utf8.decode(b"", final=True)

    def _last_bytes(self, token_ids: Sequence[int]) -> bytes:
        data = b""
        for token_id in reversed(token_ids):
            if len(data) >= _LONGEST_PARTIAL_CHARACTER_BYTES:
                break
            if token_id not in self._hidden:
                data = self._vocabulary.token_bytes(token_id) + data
        return data
