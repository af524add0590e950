"""Connecting ranks to each other. Nothing global: two meshes live in one process."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from lockstep.core.errors import ConfigError
from lockstep.parallel.mesh import Line, Mesh, TorchGroup

CONNECT_TIMEOUT_S = 120
COLLECTIVE_TIMEOUT_S = 600
LOOK_EVERY = timedelta(seconds=1)
"""Between two looks at the peers while a collective takes its time."""


def connect(
    sizes: Mapping[str, int],
    *,
    rank: int,
    store: Path,
    backend: str | None,
    device: torch.device,
    check_peers: Callable[[], None] = lambda: None,
) -> Mesh:
    """The mesh of one rank of many, which meet at the file `store`; `sizes` are those of its axes, last one fastest.

    Gloo is bound to the loopback interface. While the host waits in a collective, `check_peers` is called now and
    then: what it raises ends the wait. Raises ConfigError for a backend that is not known.
    """
    num_ranks = math.prod(sizes.values())
    if num_ranks == 1:
        return Mesh.solo()
    if backend is None or backend not in _BACKENDS:
        raise ConfigError(f"unknown collective backend {backend!r} (known: {', '.join(_BACKENDS)})")
    meeting = distributed.FileStore(str(store), num_ranks)
    meeting.set_timeout(timedelta(seconds=CONNECT_TIMEOUT_S))

    def join(line: Line) -> TorchGroup:
        corner = distributed.PrefixStore(f"{line.axis} from {line.first}", meeting)
        group = _BACKENDS[backend](corner, line.rank, line.size, device)
        return TorchGroup(group, _watchful(group, check_peers) if backend == "gloo" else _enqueue)

    return Mesh.of(sizes, rank, join)


def _enqueue(work: distributed.Work) -> None:
    """The device waits, in stream order."""
    work.wait()


def _watchful(group: Any, check_peers: Callable[[], None]) -> Callable[[distributed.Work], None]:
    """Waits on the host, and looks at the peers meanwhile.

    Gloo reports a peer that is gone as a broken connection, but not always: a send that was under way may wait on.
    A group whose wait was given up is never destroyed, for that would wait for the thread that waits on.
    """

    def wait(work: distributed.Work) -> None:
        while True:
            try:
                work.wait(LOOK_EVERY)
                return
            except RuntimeError:
                if work.is_completed():  # since just now, or in error: which of them, the next wait tells
                    work.wait()
                    return
            try:
                check_peers()
            except BaseException:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
                raise

    return wait


# torch's type stubs lack both backends' options, and know no common base of the backends.


def _gloo(store: distributed.Store, rank: int, size: int, device: torch.device) -> Any:
    gloo: Any = distributed.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    return gloo(store, rank, size, options)


def _nccl(store: distributed.Store, rank: int, size: int, device: torch.device) -> Any:
    torch.cuda.set_device(device)
    nccl: Any = distributed.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    return nccl(store, rank, size, options)


_BACKENDS = {"gloo": _gloo, "nccl": _nccl}
