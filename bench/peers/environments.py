"""A virtual environment for each peer that is not Lockstep's, kept in a cache folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lockstep.core.errors import ConfigError

BENCH_FOLDER = Path(__file__).resolve().parents[1]
DEFAULT_CACHE = Path.home() / ".cache" / "lockstep-peers"


@dataclass(frozen=True)
class Distribution:
    """What to install for a peer, exactly, and how."""

    name: str
    version: str
    flags: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


# llama.cpp is compiled here, for this processor: the wheel would be a plain one.
DISTRIBUTIONS = {
    "llama.cpp": Distribution(
        "llama-cpp-python",
        "0.3.36",
        ("--no-binary=llama-cpp-python",),
        {"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
    ),
    "openvino": Distribution("openvino-genai", "2026.4.1"),
}
"""Peer -> its distribution. Those that are absent run in Lockstep's own environment."""


def environment_python(peer: str, cache: Path) -> Path:
    """The interpreter of a peer. Raises ConfigError when it was not prepared."""
    if peer not in DISTRIBUTIONS:
        return Path(sys.executable)
    python = cache / peer / "bin" / "python"
    if not python.exists():
        raise ConfigError(f"{peer} is not installed in {cache}: run `python bench/cpu_peers.py prepare`")
    return python


def prepare_environment(peer: str, cache: Path) -> None:
    """Makes or completes the environment of a peer. Raises as `install` does."""
    install(DISTRIBUTIONS[peer], cache / peer)


def install(wanted: Distribution, folder: Path) -> None:
    """Makes or completes a virtual environment; nothing to do when the wanted version is there.

    Raises ConfigError when pip fails; its own words are on stderr then.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    if _installed_version(python, wanted.name).startswith(wanted.version):
        return
    command = [str(python), "-m", "pip", "install", "-q", *wanted.flags, f"{wanted.name}=={wanted.version}"]
    if subprocess.run(command, env={**os.environ, **wanted.variables}).returncode != 0:
        raise ConfigError(f"{wanted.name} {wanted.version} could not be installed; see pip's words above")


def run_module(peer: str, cache: Path, module: str, *arguments: str) -> list[str]:
    """The command line of a module of this folder in the environment of a peer. See `module_environment`."""
    return [str(environment_python(peer, cache)), "-m", module, *arguments]


def module_environment() -> dict[str, str]:
    """Environment variables under which `peers` can be imported anywhere."""
    return {**os.environ, "PYTHONPATH": str(BENCH_FOLDER)}


def _installed_version(python: Path, name: str) -> str:
    code = f"from importlib.metadata import version; print(version({name!r}))"
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else ""
