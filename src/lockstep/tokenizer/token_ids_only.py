"""What stands in the place of a tokenizer where prompts are token ids and answers have no text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NoReturn

from lockstep.core.errors import InvalidRequest
from lockstep.tokenizer.detokenizer import IncrementalDetokenizer
from lockstep.tokenizer.tokenizer import Tokenizer
from lockstep.tokenizer.vocabulary import Vocabulary, byte_level_bytes


class TokenIdsOnly(Tokenizer):
    """Refuses every text, and detokenises ids to none. Raises InvalidRequest where a Tokenizer would give text."""

    def __init__(self, *, eos_token_ids: Sequence[int] = (), bos_token_id: int | None = None) -> None:
        self._vocabulary = Vocabulary((), byte_level_bytes, frozenset())
        self.eos_token_ids = tuple(eos_token_ids)
        self.bos_token_id = bos_token_id
        self.chat_template = None

    def require_text(self, what: str) -> NoReturn:
        raise InvalidRequest(
            f"{what} needs a tokenizer, and this engine opened none (--skip-tokenizer-init); give token ids"
        )

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = True) -> NoReturn:
        self.require_text("a prompt of text")

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> NoReturn:
        self.require_text("the text of token ids")

    def token_bytes(self, token_id: int) -> NoReturn:
        self.require_text("the text of a token")

    def detokenizer(
        self, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()
    ) -> IncrementalDetokenizer:
        """One that gives no text."""
        return IncrementalDetokenizer(self._vocabulary)
