"""Calls as bare JSON, Llama 3's way: ``{"name": ..., "parameters": {...}}``, several parted by ``;``."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

from lockstep.server.tools.reader import Piece, Text, call_pieces

PYTHON_TAG = "<|python_tag|>"


class Llama3JsonReader:
    """An answer that begins like a call is held until its end; any other streams as text."""

    marks = (PYTHON_TAG, '"parameters"')

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._is_text = False

    def feed(self, text: str) -> Iterator[Piece]:
        self._held += text
        if self._is_text or not self._may_be_call():
            self._is_text = True
            yield from self._release()

    def finish(self) -> Iterator[Piece]:
        pieces = self._calls(self._held.strip().removeprefix(PYTHON_TAG))
        if pieces:
            self._held = ""
            yield from pieces
        else:
            yield from self._release()

    def _may_be_call(self) -> bool:
        start = self._held.lstrip()
        return start.startswith(("{", PYTHON_TAG)) or PYTHON_TAG.startswith(start)

    def _release(self) -> Iterator[Piece]:
        text, self._held = self._held, ""
        if text:
            yield Text(text)

    def _calls(self, text: str) -> list[Piece] | None:
        """All of `text` as calls, or None."""
        pieces: list[Piece] = []
        while text := text.strip(" \n\r\t;"):
            try:
                value, end = json.JSONDecoder().raw_decode(text)
            except (ValueError, RecursionError):
                return None
            found = call_pieces(value, self._names)
            if found is None:
                return None
            pieces += found
            text = text[end:]
        return pieces
