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
        names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(error).__mro__}
        if names.isdisjoint(self.types):
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
"""A test that judged, whatever led to it, is never the machine's failure."""


def infrastructure_failure(error: BaseException, loading: tuple[str, ...]) -> Kind | None:
    """What the machine did, or None: then the failure is the code's.

    Walks from the exception to its causes and, where none is stated, to what was being handled when it was raised.
    A verdict of a test on the way ends the walk. `loading` names packages: memory that runs out counts only when it
    was asked for by their code or by what that code called.
    """
    for each in _chain(error):
        names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(each).__mro__}
        if not names.isdisjoint(_VERDICTS):
            return None
        for rule in _RULES:
            if rule.matches(each, loading):
                return rule.kind
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    for _ in range(_LONGEST_CHAIN):
        if found is None:
            return
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _raised_in(traceback: TracebackType | None, packages: tuple[str, ...]) -> bool:
    while traceback is not None:
        name = str(traceback.tb_frame.f_globals.get("__name__", ""))
        if any(name == package or name.startswith(f"{package}.") for package in packages):
            return True
        traceback = traceback.tb_next
    return False
