"""Imports are inert, and the torch-free rooms work where torch is not there. Watched in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from source_tree import modules, torch_free

pytestmark = pytest.mark.suite("cpu")

WATCH = Path(__file__).with_name("import_watch.py")

ALSO_TORCH_FREE = ("engine.output", "features.grammar", "cli.main")
"""Not promised by the page: what the HTTP process and a quick `lockstep --help` stand on."""


def watched(*arguments: str, path: Path | None = None) -> dict[str, Any]:
    """What import_watch.py saw in a process of its own; `path` goes before the installed package."""
    code = (
        "import runpy, sys\n"
        f"sys.path[:0] = {[str(path)] if path else []!r}\n"
        f"sys.argv[1:] = {list(arguments)!r}\n"
        f"runpy.run_path({str(WATCH)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_torch_free_rooms_import_with_torch_blocked() -> None:
    rooms = [*torch_free(), *ALSO_TORCH_FREE]
    assert len(torch_free()) >= 9
    found = watched("without-torch", *rooms)
    assert found["failed"] == {} and not found["torch"]
    for room in rooms:
        wanted = {
            m.name for m in modules() if m.name == f"lockstep.{room}" or m.name.startswith(f"lockstep.{room}.")
        }
        assert wanted and wanted <= set(found["imported"]), room


def test_the_block_blocks() -> None:
    assert "torch is blocked" in watched("without-torch", "layers", "core")["failed"]["layers"]


def test_imports_only_define_names() -> None:
    """No environment, threads, processes, sockets or written files; no question to a device."""
    found = watched("inert")
    assert found["offences"] == []
    assert found["threads"] == ["MainThread"]
    assert not found["cuda_started"] and not found["ranks_joined"] and found["default_dtype"] == "torch.float32"
    assert set(found["imported"]) >= {m.name for m in modules() if not m.name.endswith("__main__")}


OFFENCES = {
    "import os; HOME = os.environ.get('HOME')": "_Environ.__getitem__",
    "import os; ALL = dict(os.environ)": "_Environ.__iter__",
    "import os; HOME = os.getenv('HOME')": "_Environ.__getitem__",
    "import os; os.environ['LOCKSTEP_X'] = '1'": "os.putenv",
    "import threading; threading.Thread(target=print, daemon=True).start()": "Thread.start",
    "import subprocess; subprocess.run(['true'])": "subprocess.Popen",
    "import torch; GPU = torch.cuda.is_available()": "torch.cuda.is_available",
    "import socket; socket.socket().bind(('127.0.0.1', 0))": "socket.bind",
    "open('/dev/null', 'w').close()": "open",
}


def test_the_watch_sees(tmp_path: Path) -> None:
    """Each offence, in a package of the same name with one module that commits it."""
    package = tmp_path / "lockstep"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for number, line in enumerate(OFFENCES):
        (package / f"wrong{number}.py").write_text(f"{line}\n")
    found = watched("inert", path=tmp_path)["offences"]
    for number, seen in enumerate(OFFENCES.values()):
        assert any(each.startswith(f"/wrong{number}.py:1 {seen}") for each in found), (seen, found)
