"""What a piece of an answer can be, and the protocol of those that take answers apart."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Text:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of the named function begins."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of the arguments of the call that began last."""

    text: str


Piece = Text | CallStart | CallArguments


class AnswerReader(Protocol):
    """Takes one answer apart while it grows. Nothing is lost: what is no call comes out as text."""

    def feed(self, text: str) -> Iterator[Piece]:
        """Pieces that are certain after this text."""
        ...

    def finish(self) -> Iterator[Piece]:
        """What was held back, once the answer has ended."""
        ...


class TextReader:
    """An answer without calls."""

    def feed(self, text: str) -> Iterator[Piece]:
        if text:
            yield Text(text)

    def finish(self) -> Iterator[Piece]:
        yield from ()


class FirstCallReader:
    """What another reader finds, but for calls after the first."""

    def __init__(self, reader: AnswerReader) -> None:
        self._reader = reader
        self._num_calls = 0

    def feed(self, text: str) -> Iterator[Piece]:
        return self._wanted(self._reader.feed(text))

    def finish(self) -> Iterator[Piece]:
        return self._wanted(self._reader.finish())

    def _wanted(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            self._num_calls += isinstance(piece, CallStart)
            if isinstance(piece, Text) or self._num_calls == 1:
                yield piece


def call_pieces(value: Any, names: Collection[str]) -> list[Piece] | None:
    """A parsed `name` with `arguments` or `parameters` as pieces; None unless it calls a known tool."""
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in names:
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if not isinstance(arguments, (str, dict, type(None))):
        return None
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    # Half of a surrogate pair is no text that an answer could hold.
    is_text = not any("\ud800" <= letter <= "\udfff" for letter in text)
    return [CallStart(name), CallArguments(text)] if is_text else None


def held_back(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0
