"""The tokenizer of one model: text to ids and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from lockstep.core.errors import InvalidRequest
from lockstep.tokenizer.chat_template import ChatTemplate
from lockstep.tokenizer.detokenizer import IncrementalDetokenizer
from lockstep.tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

LONG_TEXT_CHARACTERS = 16_384
"""From here on (some 10 ms of work) a text is encoded in the library's own threads, beside the interpreter."""


class Tokenizer:
    """Encodes with a `tokenizers` pipeline, decodes by joining the exact bytes of tokens.

    Bytes that are not UTF-8 decode to U+FFFD as the Unicode standard recommends (one per maximal subpart).
    `strips_leading_space` says that encoding put a space before the text which decoding takes away again.
    `bos_token_id` is None and `eos_token_ids` empty when the model has none. Safe to use from several threads.
    """

    def __init__(
        self,
        backend: Backend,
        vocabulary: Vocabulary,
        *,
        eos_token_ids: Sequence[int] = (),
        bos_token_id: int | None = None,
        strips_leading_space: bool = False,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self._backend = backend
        self._vocabulary = vocabulary
        self._strips_leading_space = strips_leading_space
        self.eos_token_ids = tuple(eos_token_ids)
        self.bos_token_id = bos_token_id
        self.chat_template = chat_template

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id; the model's embedding may be larger."""
        return len(self._vocabulary)

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Ids that steer the model and are left out of an answer's text."""
        return self._vocabulary.special

    def require_text(self, what: str) -> None:
        """Does nothing: there is text. Raises InvalidRequest, naming what was asked for, where there is none."""
        return

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        `add_special_tokens` adds what the model wants around a text (a beginning token, say). With
        `parse_special` off, text that spells a special token is ordinary text. Raises InvalidRequest for a
        text that is not valid Unicode.
        """
        backend = self._backend if parse_special else self._literal_backend
        try:
            if len(text) < LONG_TEXT_CHARACTERS:
                return backend.encode(text, add_special_tokens=add_special_tokens).ids
            # The library lets other threads run while it encodes a batch, not while it encodes one text.
            return backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except TypeError as error:
            raise InvalidRequest("the text holds half of a surrogate pair, which is not Unicode") from error

    @cached_property
    def _literal_backend(self) -> Backend:
        """A second pipeline: what special tokens mean is set for all calls, and no call may wait for others."""
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of these ids; ids past the vocabulary stand for nothing."""
        detokenizer = self.detokenizer(skip_special_tokens)
        return detokenizer.push(token_ids) + detokenizer.finish()

    def detokenizer(
        self, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()
    ) -> IncrementalDetokenizer:
        """A fresh detokenizer for ids that follow `prompt_ids`."""
        return IncrementalDetokenizer(
            self._vocabulary,
            skip_special_tokens=skip_special_tokens,
            strips_leading_space=self._strips_leading_space,
            prompt_ids=prompt_ids,
        )

    def token_bytes(self, token_id: int) -> bytes:
        """Exact bytes of one token, which need not be whole characters; a special token's are its name."""
        return self._vocabulary.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        r"""One token for display beside its log-probability; parts of characters read ``bytes:\xe4\xbd``."""
        data = self.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
