"""Log-probabilities in the three shapes that clients expect: chat, legacy completions, native."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from lockstep.core.step import TokenLogprob
from lockstep.tokenizer.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say; OpenAI's API uses the same number."""


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": _finite(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def chat_entry(tokenizer: Tokenizer, found: TokenLogprob) -> dict[str, Any]:
    """One element of ``logprobs.content`` of a chat completion."""
    best = [_chat_token(tokenizer, token_id, logprob) for token_id, logprob in found.top]
    return _chat_token(tokenizer, found.token_id, found.logprob) | {"top_logprobs": best}


def prompt_entries(tokenizer: Tokenizer, found: Sequence[TokenLogprob]) -> list[dict[str, Any] | None]:
    """Our `prompt_logprobs` extension: one entry per prompt token; the first has nothing before it."""
    return [None, *(chat_entry(tokenizer, entry) for entry in found)]


def native_entries(
    tokenizer: Tokenizer, found: Iterable[TokenLogprob]
) -> tuple[list[list[Any]], list[list[list[Any]]]]:
    """`(logprob, token id, text)` of each token, and of its alternatives."""

    def triple(token_id: int, logprob: float) -> list[Any]:
        return [_finite(logprob), token_id, tokenizer.token_text(token_id)]

    entries = list(found)
    chosen = [triple(entry.token_id, entry.logprob) for entry in entries]
    return chosen, [[triple(*alternative) for alternative in entry.top] for entry in entries]


class LegacyLogprobs:
    """The `logprobs` object of /v1/completions, grown token by token.

    `text_offset` counts characters from the start of the choice's text.
    """

    def __init__(self, tokenizer: Tokenizer, num_top: int, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def add(self, tokens: Iterable[tuple[int, TokenLogprob]]) -> dict[str, list[Any]]:
        """The object for further tokens."""
        shape = _empty()
        for token_id, found in tokens:
            self._append(shape, token_id, found, self._num_characters(token_id))
        return shape

    def add_echo(self, tokens: Iterable[tuple[int, TokenLogprob | None]], text: str) -> dict[str, list[Any]]:
        """The object for a prompt, which begins the choice's text; its first token has nulls."""
        shape = _empty()
        for token_id, found in tokens:
            self._append(shape, token_id, found, self._num_echoed(token_id, text))
        self._offset = len(text)
        self._decoder.reset()
        return shape

    def _append(
        self, shape: dict[str, list[Any]], token_id: int, found: TokenLogprob | None, num_characters: int
    ) -> None:
        shape["tokens"].append(self._tokenizer.token_text(token_id))
        shape["text_offset"].append(self._offset)
        shape["token_logprobs"].append(None if found is None else _finite(found.logprob))
        shape["top_logprobs"].append(None if found is None else self._top(found))
        self._offset += num_characters

    def _top(self, found: TokenLogprob) -> dict[str, float]:
        # Best first, and the first of two equal names stays: a greedy check by the maximum keeps working.
        best: dict[str, float] = {}
        for token_id, logprob in found.top[: self._num_top]:
            best.setdefault(self._tokenizer.token_text(token_id), _finite(logprob))
        best.setdefault(self._tokenizer.token_text(found.token_id), _finite(found.logprob))
        return best

    def _num_echoed(self, token_id: int, text: str) -> int:
        """Characters of the prompt: tokens put around it, or a space put before it, are none of it."""
        piece = self._decoder.decode(self._tokenizer.token_bytes(token_id))
        if self._offset == 0 and not text.startswith(piece):
            piece = piece.removeprefix(" ")
        if text.startswith(piece, self._offset):
            return len(piece)
        return 0 if token_id in self._tokenizer.special_token_ids else min(len(piece), len(text) - self._offset)

    def _num_characters(self, token_id: int) -> int:
        if self._skip_special_tokens and token_id in self._tokenizer.special_token_ids:
            return 0
        return len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))


def _empty() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
