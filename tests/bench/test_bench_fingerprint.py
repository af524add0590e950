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
from lockstep.bench import processor
from lockstep.bench.fingerprint import describe, fingerprint, was_busy
from lockstep.ci.gates.baseline import machine_id

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


LINUX = {
    "proc/cpuinfo": "cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nstepping\t: 1\nflags\t: fpu hypervisor\n"
    "\ncpu family\t: 1\n",
    "sys/devices/system/cpu/cpu0/cache/index0/level": "1\n",
    "sys/devices/system/cpu/cpu0/cache/index0/type": "Data\n",
    "sys/devices/system/cpu/cpu0/cache/index0/size": "32K\n",
    "sys/class/dmi/id/product_name": "c6a.large\n",
}


def test_two_processors_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, text in LINUX.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "proc/cpuinfo")
    monkeypatch.setattr(processor, "_CACHES", tmp_path / "sys/devices/system/cpu/cpu0/cache")
    monkeypatch.setattr(processor, "_BOARD", tmp_path / "sys/class/dmi/id")
    found = processor.processor_details()
    expected = {"cpu family": 25, "model": 17, "stepping": 1, "hypervisor": True, "caches": ["L1 Data 32K"]}
    assert found == {**expected, "board": "c6a.large"}
    (tmp_path / "sys/devices/system/cpu/cpu0/cache/index0/size").write_text("48K\n")
    devices = [{"name": "AMD EPYC", "memory_bytes": 2**34}]
    machines = [{"devices": devices, "processor": each} for each in (found, processor.processor_details(), {})]
    assert len(set(map(machine_id, machines))) == 3
    (tmp_path / "proc/cpuinfo").unlink()
    assert "model" not in processor.processor_details()


def test_the_details_are_the_system_s() -> None:
    found = processor.processor_details()
    assert found == processor.processor_details() and json.loads(json.dumps(found)) == found
    if Path("/proc/cpuinfo").exists():
        cpuinfo = Path("/proc/cpuinfo").read_text()
        assert ("hypervisor" in cpuinfo) == found.get("hypervisor", False)
    assert fingerprint()["processor"] == found


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
