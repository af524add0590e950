"""On which machine, with which versions and under which load a result was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lockstep
from lockstep.bench.processor import processor_details
from lockstep.platforms.registry import load_platform, platform_names

LIBRARIES = (
    "torch",
    "triton",
    "transformers",
    "numpy",
    "tokenizers",
    "safetensors",
    "llguidance",
    "httpx",
    "uvicorn",
)
BUSY_LOAD = 0.5
"""Runnable processes (average of the last minute) above which a machine was not quiet."""


def fingerprint() -> dict[str, Any]:
    """Facts about this machine and this installation, as JSON types.

    Take it before measuring: `load_average` is that of the last minute, None where the system keeps none.
    """
    return {
        "devices": _devices(),
        "processor": processor_details(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "libraries": {name: found for name in LIBRARIES if (found := _version(name)) is not None},
        "lockstep": lockstep.__version__,
        **_checkout(Path(lockstep.__file__).resolve().parents[2]),
        "load_average": _load_average(),
    }


def describe(machine: dict[str, Any]) -> list[str]:
    """The fingerprint for people, one line a subject."""
    devices = "; ".join(_device_line(device) for device in machine["devices"])
    commit = ""
    if machine["commit"]:
        commit = f" ({machine['commit'][:12]}{', modified' if machine['modified'] else ''})"
    libraries = ", ".join(f"{name} {found}" for name, found in machine["libraries"].items())
    return [
        devices,
        f"{machine['os']}, Python {machine['python']}",
        f"lockstep {machine['lockstep']}{commit}, {libraries}",
    ]


def was_busy(machine: dict[str, Any]) -> bool:
    """True when something else was running as the fingerprint was taken."""
    return (machine["load_average"] or 0.0) > BUSY_LOAD


def _devices() -> list[dict[str, Any]]:
    """Every usable device family that has memory, the host's processor among them."""
    found = []
    for name in platform_names():
        family = load_platform(name)
        if family.unavailable_reason() is not None:
            continue
        facts = family.capabilities()
        if facts.memory_bytes:
            found.append(
                {
                    "platform": facts.platform,
                    "name": facts.device_name,
                    "num_devices": facts.num_devices,
                    "num_threads": facts.num_threads,
                    "memory_bytes": facts.memory_bytes,
                    "features": sorted(facts.features),
                }
            )
    return found


def _device_line(device: dict[str, Any]) -> str:
    count = f"{device['num_devices']} x " if device["num_devices"] > 1 else ""
    threads = f"{device['num_threads']} cores, " if device["num_threads"] > 1 else ""
    features = " ".join(device["features"])
    return f"{count}{device['name']}: {threads}{device['memory_bytes'] / 2**30:.1f} GiB, {features}".rstrip(
        ", "
    )


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _checkout(root: Path) -> dict[str, Any]:
    """Commit of the source tree that is running and whether it was changed since; None outside of a checkout."""
    if not (root / ".git").exists():
        return {"commit": None, "modified": None}
    commit, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--", "src")
    return {"commit": commit or None, "modified": None if changes is None else bool(changes)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _load_average() -> float | None:
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None
