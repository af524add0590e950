"""Run as a program: imports modules of the package and prints, as JSON, what their imports did beside defining names.

`without-torch NAME...` imports the named rooms and modules with torch blocked. `inert` imports every module and
watches the environment, threads, processes, sockets, written files and questions to devices.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

STANDARD_LIBRARY = sysconfig.get_path("stdlib")
FORBIDDEN_EVENTS = (
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.putenv",
    "os.unsetenv",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "socket.bind",
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "signal.pthread_kill",
)
DEVICE_QUESTIONS = {
    "torch.cuda": ("is_available", "device_count", "current_device", "get_device_properties", "init"),
    "torch.accelerator": ("is_available", "device_count", "current_accelerator"),
    "torch.backends.mps": ("is_available",),
    "torch": ("set_num_threads", "get_num_threads", "compile", "manual_seed", "set_default_dtype"),
}


def names_below(name: str) -> Iterator[str]:
    """The module and, for a package, everything in it."""
    module = importlib.import_module(name)
    yield name
    for found in pkgutil.walk_packages(getattr(module, "__path__", ()), f"{name}."):
        yield found.name


class BlockTorch:
    """Finds torch and says no."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "torch":
            raise ImportError(f"{name} is blocked")


def without_torch(rooms: list[str]) -> dict[str, Any]:
    sys.meta_path.insert(0, BlockTorch())
    imported, failed = [], {}
    for room in rooms:
        try:
            for name in names_below(f"lockstep.{room}"):
                importlib.import_module(name)
                imported.append(name)
        except ImportError as error:
            failed[room] = str(error)
    return {"imported": imported, "failed": failed, "torch": "torch" in sys.modules}


class Watch:
    """Remembers what the package's own code does, found by the first frame that is not the standard library's."""

    def __init__(self, package: Path) -> None:
        self._package = str(package)
        self.offences: list[str] = []

    def note(self, what: str) -> None:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            file = frame.f_code.co_filename
            own = file == __file__ or file.startswith((STANDARD_LIBRARY, "<frozen"))
            if not own or "site-packages" in file:
                if file.startswith(self._package):
                    self.offences.append(f"{file.removeprefix(self._package)}:{frame.f_lineno} {what}")
                return
            frame = frame.f_back

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if event in FORBIDDEN_EVENTS or writes:
            self.note(event)

    def wrap(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            self.note(f"{getattr(owner, '__name__', owner)}.{name}")
            return original(*arguments, **options)

        setattr(owner, name, watched)


def inert() -> dict[str, Any]:
    import torch

    import lockstep

    watch = Watch(Path(lockstep.__file__).parent)
    for owner, names in DEVICE_QUESTIONS.items():
        for name in names:
            watch.wrap(importlib.import_module(owner), name)
    watch.wrap(threading.Thread, "start")
    for name in ("__getitem__", "__iter__", "__setitem__", "__delitem__"):
        watch.wrap(type(os.environ), name)
    sys.addaudithook(watch.audit)
    imported = []
    for name in names_below("lockstep"):
        if not name.endswith("__main__"):
            importlib.import_module(name)
            imported.append(name)
    return {
        "imported": imported,
        "offences": watch.offences,
        "threads": [thread.name for thread in threading.enumerate()],
        "cuda_started": torch.cuda.is_initialized(),
        "ranks_joined": torch.distributed.is_initialized(),
        "default_dtype": str(torch.get_default_dtype()),
    }


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    print(json.dumps(without_torch(arguments) if command == "without-torch" else inert()))
