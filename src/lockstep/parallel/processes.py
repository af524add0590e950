"""Connecting ranks to each other. Nothing global: two meshes live in one process."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from lockstep.core.errors import ConfigError
from lockstep.parallel.mesh import Mesh, TorchGroup

CONNECT_TIMEOUT_S = 120
COLLECTIVE_TIMEOUT_S = 600


def connect(axis: str, *, rank: int, size: int, store: Path, backend: str, device: torch.device) -> Mesh:
    """A mesh of `size` ranks along one axis that meet at the file `store`; this is number `rank`.

    Gloo is bound to the loopback interface. Raises ConfigError for a backend that is not known.
    """
    if size == 1:
        return Mesh.solo()
    meeting = distributed.FileStore(str(store), size)
    meeting.set_timeout(timedelta(seconds=CONNECT_TIMEOUT_S))
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    if backend == "gloo":
        # torch's type stubs lack these two, and know no common base of the backends.
        gloo: Any = distributed.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._timeout = timeout
        return Mesh({axis: TorchGroup(gloo(meeting, rank, size, options))})
    if backend == "nccl":
        torch.cuda.set_device(device)
        nccl: Any = distributed.ProcessGroupNCCL
        nccl_options = nccl.Options()
        nccl_options._timeout = timeout
        return Mesh({axis: TorchGroup(nccl(meeting, rank, size, nccl_options))})
    raise ConfigError(f"unknown collective backend {backend!r} (known: gloo, nccl)")
