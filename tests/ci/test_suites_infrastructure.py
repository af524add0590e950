"""Failures of the machine are told by type and code, in whatever they are wrapped; never by what their text says."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import zmq

from lockstep.ci.infrastructure import infrastructure_failure
from lockstep.core.errors import EngineDead, OutOfMemory

pytestmark = pytest.mark.suite("cpu")

LOADING = ("somewhere.loading",)


def lost_device(code: int) -> Exception:
    error = torch.AcceleratorError("CUDA error")
    error.error_code = code  # type: ignore[attr-defined]
    return error


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def raised_in(module: str, error: BaseException) -> BaseException:
    """Raised by a function of a module of that name."""
    code = ModuleType(module)
    exec("def work(error):\n    raise error", code.__dict__)
    try:
        code.work(error)
    except BaseException as caught:
        return caught
    raise AssertionError("nothing was raised")


def wrapped(error: BaseException, outside: BaseException, *, stated: bool = True) -> BaseException:
    """`outside` raised from `error`, or while it was handled."""
    try:
        try:
            raise error
        except BaseException as caught:
            if stated:
                raise outside from caught
            raise outside  # noqa: B904 - the context is what is wanted
    except BaseException as caught:
        return caught


class Group(Exception):
    """Several errors in one, as Python 3.11 and later have it."""

    def __init__(self, exceptions: list[BaseException]) -> None:
        super().__init__("several")
        self.exceptions = exceptions


def bound_twice() -> BaseException:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        first.listen()
        try:
            second.bind(first.getsockname())
        except OSError as error:
            return error
    raise AssertionError("the port was free")


def bound_twice_by_zmq() -> BaseException:
    context = zmq.Context()
    first, second = context.socket(zmq.REP), context.socket(zmq.REP)
    try:
        port = first.bind_to_random_port("tcp://127.0.0.1")
        second.bind(f"tcp://127.0.0.1:{port}")
    except zmq.ZMQError as error:
        return error
    finally:
        first.close(0)
        second.close(0)
        context.term()
    raise AssertionError("the port was free")


def unknown_host() -> BaseException:
    return raised(socket.gaierror(socket.EAI_NONAME, "unknown"))


MACHINE: dict[str, tuple[str, Callable[[], BaseException]]] = {
    "a port": ("port in use", bound_twice),
    "a port of zmq": ("port in use", bound_twice_by_zmq),
    "a host": ("network", unknown_host),
    "a network": ("network", lambda: raised(OSError(errno.ENETUNREACH, "x"))),
    "an uncorrectable error of memory": ("device lost", lambda: raised(lost_device(214))),
    "memory while loading": (
        "out of memory while loading",
        lambda: raised_in("somewhere.loading.files", torch.OutOfMemoryError("x")),
    ),
    "our own error of memory while loading": (
        "out of memory while loading",
        lambda: raised_in("somewhere.loading", OutOfMemory("x")),
    ),
    "a cause": (
        "port in use",
        lambda: wrapped(OSError(errno.EADDRINUSE, "x"), EngineDead("the engine did not start")),
    ),
    "what was being handled": (
        "port in use",
        lambda: wrapped(OSError(errno.EADDRINUSE, "x"), EngineDead("x"), stated=False),
    ),
    "an error of the machine while handling another": (
        "port in use",
        lambda: wrapped(OSError(errno.ENETUNREACH, "x"), OSError(errno.EADDRINUSE, "x"), stated=False),
    ),
}

CODE: dict[str, Callable[[], BaseException]] = {
    "oom inside room": lambda: raised(
        RuntimeError("no room for the bedroom: CUDA out of memory, address in use")
    ),
    "memory while computing": lambda: raised_in("somewhere.layers", torch.OutOfMemoryError("x")),
    "a module that is only called alike": lambda: raised_in("somewhere.loadings", torch.OutOfMemoryError("x")),
    "a class that is only called alike": lambda: raised(type("OutOfMemoryError", (RuntimeError,), {})("x")),
    "an illegal address": lambda: raised(lost_device(700)),
    "a server that hung up": lambda: raised(ConnectionResetError(errno.ECONNRESET, "x")),
    "a server that is gone": lambda: raised(ConnectionRefusedError(errno.ECONNREFUSED, "x")),
    "a missing file": lambda: raised(FileNotFoundError(errno.ENOENT, "x")),
    "an assertion": lambda: raised(AssertionError("port in use")),
    "an assertion over a machine's failure": lambda: wrapped(
        OSError(errno.EADDRINUSE, "x"), AssertionError("x")
    ),
    "a verdict while handling one": lambda: wrapped(
        OSError(errno.EADDRINUSE, "x"), pytest.fail.Exception("x"), stated=False
    ),
    "the machine in the clean-up of a failed assertion": lambda: wrapped(
        AssertionError("0.41 > 0.6"), OSError(errno.EADDRINUSE, "x"), stated=False
    ),
    "the machine named as the consequence of an assertion": lambda: wrapped(
        AssertionError("x"), OSError(errno.EADDRINUSE, "x")
    ),
    "an assertion that a clean-up hides": lambda: wrapped(
        wrapped(AssertionError("x"), KeyError("x"), stated=False), OSError(errno.EADDRINUSE, "x"), stated=False
    ),
    "an assertion in a group": lambda: wrapped(Group([AssertionError("x")]), OSError(errno.EADDRINUSE, "x")),
    "a wrong result before the machine's error": lambda: wrapped(
        ValueError("wrong"), OSError(errno.EADDRINUSE, "x"), stated=False
    ),
    "a wrong result while handling the machine's error": lambda: wrapped(
        OSError(errno.EADDRINUSE, "x"), ValueError("wrong"), stated=False
    ),
    "an error below an assertion": lambda: wrapped(
        wrapped(OSError(errno.EADDRINUSE, "x"), AssertionError("x")), EngineDead("x")
    ),
}


@pytest.mark.parametrize("name", MACHINE)
def test_the_machine_failed(name: str) -> None:
    kind, make = MACHINE[name]
    assert infrastructure_failure(make(), LOADING) == kind


@pytest.mark.parametrize("name", CODE)
def test_the_code_failed(name: str) -> None:
    assert infrastructure_failure(CODE[name](), LOADING) is None


def test_what_is_hidden_on_purpose_does_not_count() -> None:
    try:
        try:
            raise OSError(errno.EADDRINUSE, "x")
        except OSError:
            raise EngineDead("x") from None
    except EngineDead as error:
        assert infrastructure_failure(error, LOADING) is None


def test_a_chain_that_bites_its_tail_ends() -> None:
    one, other = EngineDead("x"), EngineDead("y")
    one.__cause__, other.__cause__ = other, one
    assert infrastructure_failure(one, LOADING) is None
