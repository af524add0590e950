"""What each token id stands for, byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


def _printable_byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the rest for U+0100 upwards in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


_BYTE_OF = _printable_byte_alphabet()


def byte_level_bytes(text: str) -> bytes:
    """Bytes of a byte-level BPE token; a token outside the alphabet is an added one, written as it is."""
    try:
        return bytes([_BYTE_OF[char] for char in text])
    except KeyError:
        return text.encode()


def sentencepiece_bytes(text: str) -> bytes:
    """Bytes of a SentencePiece token: "<0xE4>" is one byte, U+2581 is a space."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return bytes([int(text[3:5], 16)])
        except ValueError:
            pass
    return text.replace("\u2581", " ").encode()


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by id as the model's files spell them, and how to read that spelling.

    `verbatim` tokens are written as they are, whatever the spelling; `special` ones steer the model and are not
    part of an answer's text. Ids past the end (models pad their embedding) and holes stand for nothing.
    """

    texts: Sequence[str]
    spelling: Callable[[str], bytes]
    special: frozenset[int]
    verbatim: frozenset[int] = frozenset()
    _known: dict[int, bytes] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.texts)

    def token_bytes(self, token_id: int) -> bytes:
        """Exact bytes of one token, which need not be whole characters."""
        known = self._known.get(token_id)
        if known is not None:
            return known
        if not 0 <= token_id < len(self.texts):
            return b""
        text = self.texts[token_id]
        self._known[token_id] = found = text.encode() if token_id in self.verbatim else self.spelling(text)
        return found
