"""Which failures are the machine's and not the code's: told by the type of the exception, never by its text."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

Kind = Literal["device lost", "port in use", "out of memory while loading", "network"]

_LONGEST_CHAIN = 32
"""Exceptions of one chain that are looked at; chains can be circular."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """`types` are "module.Class", base classes included. `codes`, when given, must hold the exception's `attribute`."""

    kind: Kind
    types: tuple[str, ...]
    attribute: str = ""
    codes: frozenset[int] = frozenset()
    while_loading: bool = False

    def matches(self, error: BaseException, loading: tuple[str, ...]) -> bool:
        if not _is_a(error, self.types):
            return False
        if self.codes and getattr(error, self.attribute, None) not in self.codes:
            return False
        return not self.while_loading or _raised_in(error.__traceback__, loading)


_LOST_DEVICE = frozenset({46, 100, 127, 214, 220, 802})
"""cudaErrorDevicesUnavailable, NoDevice, StartupFailure, ECCUncorrectable, NvlinkUncorrectable, SystemNotReady. An
illegal address or a failed launch is missing on purpose: a kernel did that. Source: CUDA Runtime API, cudaError_t."""

_RULES = (
    _Rule("port in use", ("builtins.OSError", "zmq.error.ZMQError"), "errno", frozenset({errno.EADDRINUSE})),
    # A refused or broken connection is missing on purpose: the peer is mostly a server under test.
    _Rule("network", ("socket.gaierror", "socket.herror")),
    _Rule(
        "network",
        ("builtins.OSError",),
        "errno",
        frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ETIMEDOUT}),
    ),
    _Rule("device lost", ("torch.AcceleratorError",), "error_code", _LOST_DEVICE),
    _Rule(
        "out of memory while loading",
        ("builtins.MemoryError", "torch.OutOfMemoryError", "lockstep.core.errors.OutOfMemory"),
        while_loading=True,
    ),
)

_VERDICTS = ("builtins.AssertionError", "_pytest.outcomes.OutcomeException")
"""A test that judged, whatever came before or after, is never the machine's failure."""

_WRAPPERS = ("lockstep.core.errors.EngineDead", "lockstep.core.errors.ModelFileError", "urllib.error.URLError")
"""Errors that only report another one: what was being handled when they were raised is what went wrong."""


def infrastructure_failure(error: BaseException, loading: tuple[str, ...]) -> Kind | None:
    """What the machine did, or None: then the failure is the code's.

    A verdict of a test, a stated cause or whatever was being handled anywhere behind `error`, makes it the code's.
    Otherwise the machine must have failed first: an error of the machine's kinds excuses `error` and what was raised
    from it, and only the machine's other errors may lie behind it. So an error of the clean-up does not excuse the
    wrong result that led there. `loading` names packages: memory that runs out counts only when it was asked for by
    their code or by what that code called.
    """
    if any(_is_a(each, _VERDICTS) for each in _everything_behind(error)):
        return None
    kind: Kind | None = None
    found: BaseException | None = error
    for _ in range(_LONGEST_CHAIN):
        if found is None:
            return kind
        here = next((rule.kind for rule in _RULES if rule.matches(found, loading)), None)
        is_wrapper = _is_a(found, _WRAPPERS)
        if kind is not None and here is None and not is_wrapper:
            return None
        kind = kind or here
        handled = None if is_wrapper and found.__suppress_context__ else found.__context__
        found = found.__cause__ or (handled if is_wrapper or here is not None else None)
    return None


def _is_a(error: BaseException, types: tuple[str, ...]) -> bool:
    return not {f"{cls.__module__}.{cls.__qualname__}" for cls in type(error).__mro__}.isdisjoint(types)


def _everything_behind(error: BaseException) -> Iterator[BaseException]:
    """The error, its causes, what was being handled (hidden or not) and members of groups, each once."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting and len(seen) < _LONGEST_CHAIN:
        found = waiting.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        waiting += [found.__cause__, found.__context__, *getattr(found, "exceptions", ())]


def _raised_in(traceback: TracebackType | None, packages: tuple[str, ...]) -> bool:
    while traceback is not None:
        name = str(traceback.tb_frame.f_globals.get("__name__", ""))
        if any(name == package or name.startswith(f"{package}.") for package in packages):
            return True
        traceback = traceback.tb_next
    return False
