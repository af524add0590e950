"""Errors that cross rooms. Each message says what was wrong, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LockstepError(Exception):
    """Base of every error that Lockstep raises on purpose. A user sees its text, never a traceback."""


class InvalidRequest(LockstepError):
    """A request asks for something impossible or malformed.

    `param` names the offending field as the client wrote it; `code` is a stable, machine-readable word.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class QueueFull(LockstepError):
    """The bounded queue has no room. The client may try again after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDead(LockstepError):
    """The engine process that held this request is gone; the request was not completed."""


class ConfigError(LockstepError):
    """An option has a value that cannot work; the text names the option and the remedy."""


class ModelFileError(LockstepError):
    """A model file is missing, truncated, corrupt or of an unsupported kind."""


class OutOfMemory(LockstepError):
    """Weights, workspace or the KV pool do not fit; the text says by how much and what to change."""


class PlacementError(LockstepError):
    """A value was used with the wrong parallel placement: a reduction is missing, doubled or misplaced."""


class KernelError(LockstepError):
    """No kernel can serve an operator as asked, or a kernel asked for by name refuses; the text says why."""


class IntegrityError(LockstepError):
    """A self-check failed: the state of an owner (pages, tree, queue, ranks) contradicts itself."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint such as ``; did you mean 'top_k'?``, or an empty string when nothing is close."""
    found = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""
