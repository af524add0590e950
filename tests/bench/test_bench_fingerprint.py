"""The fingerprint against what the system itself says."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

import lockstep
from lockstep.bench import fingerprint as module
from lockstep.bench.fingerprint import describe, fingerprint, was_busy

pytestmark = pytest.mark.suite("cpu")


def test_the_machine_is_this_one() -> None:
    machine = fingerprint()
    [host] = [device for device in machine["devices"] if device["platform"] == "cpu"]
    assert 1 <= host["num_threads"] <= len(os.sched_getaffinity(0))
    assert 0 < host["memory_bytes"] <= psutil.virtual_memory().total
    cpuinfo = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    for word in (*host["features"], *([host["name"]] if cpuinfo else [])):
        assert not cpuinfo or word in cpuinfo
    assert machine["python"] == ".".join(map(str, sys.version_info[:3]))
    assert platform.machine() in machine["os"]
    assert machine["libraries"]["torch"] == torch.__version__
    assert machine["lockstep"] == lockstep.__version__
    assert machine["load_average"] == pytest.approx(os.getloadavg()[0], abs=1.0)
    assert len([device for device in machine["devices"] if device["platform"] == "null"]) == 0
    assert json.loads(json.dumps(machine)) == machine


def test_the_commit_is_gits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    package = tmp_path / "src" / "lockstep" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text("")
    monkeypatch.setattr(module.lockstep, "__file__", str(package))
    assert (fingerprint()["commit"], fingerprint()["modified"]) == (None, None), "no checkout"
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    assert (fingerprint()["commit"], fingerprint()["modified"]) == (git("rev-parse", "HEAD"), False)
    package.write_text("changed = True")
    assert fingerprint()["modified"] is True


def test_for_people() -> None:
    machine = fingerprint() | {"commit": "0123456789abcdef", "modified": True, "load_average": 3.0}
    text = "\n".join(describe(machine))
    for part in (machine["devices"][0]["name"], "GiB", "Python 3.", "(0123456789ab, modified)", "torch "):
        assert part in text
    assert was_busy(machine)
    assert not was_busy(machine | {"load_average": 0.2})
    assert not was_busy(machine | {"load_average": None})
