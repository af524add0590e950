"""Calls written as ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``: Hermes, Qwen, others."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

from lockstep.server.tools.reader import Piece, Text, call_pieces, held_back

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesReader:
    """Text streams; a call is given whole, once its JSON is known to be one."""

    marks = (OPEN,)

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._buffer = ""
        self._in_call = False
        self._after_call = False

    def feed(self, text: str) -> Iterator[Piece]:
        self._buffer += text
        while True:
            tag = CLOSE if self._in_call else OPEN
            before, found, after = self._buffer.partition(tag)
            if not found:
                break
            self._buffer = after
            yield from self._call(before, closed=True) if self._in_call else self._text(before)
            self._in_call = not self._in_call
        if not self._in_call:
            keep = held_back(self._buffer, OPEN)
            ready, self._buffer = (
                self._buffer[: len(self._buffer) - keep],
                self._buffer[len(self._buffer) - keep :],
            )
            yield from self._text(ready)

    def finish(self) -> Iterator[Piece]:
        rest, self._buffer = self._buffer, ""
        yield from self._call(rest, closed=False) if self._in_call else self._text(rest)

    def _text(self, text: str) -> Iterator[Piece]:
        if self._after_call:
            text = text.lstrip()  # the line break between two calls belongs to neither
        if text:
            self._after_call = False
            yield Text(text)

    def _call(self, body: str, *, closed: bool) -> Iterator[Piece]:
        try:
            pieces = call_pieces(json.loads(body), self._names)
        except (ValueError, RecursionError):
            pieces = None
        self._after_call = pieces is not None
        yield from pieces or [Text(OPEN + body + (CLOSE if closed else ""))]
