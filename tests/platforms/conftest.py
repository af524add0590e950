"""One thread for small cases, fresh interpreters, and tiny models in directories that an LLM can open."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lockstep.platforms.registry import load_platform
from lockstep.platforms.skeleton import write_skeleton


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Threads that wait for each other take longer than the work of a small case."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sim() -> torch.device:
    return load_platform("sim").device()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that the tests of a new platform's skeleton use."""
    directory = tmp_path_factory.mktemp("tiny_llama")
    path = next(file for file in write_skeleton("anything", directory) if file.name == "tiny_llama.py")
    _imported(path).write_tiny_llama(directory)
    return directory


def _imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Fresh:
    """Runs Python text in an interpreter of its own."""

    def __call__(self, text: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "ignore", "-c", text]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    def output(self, text: str) -> str:
        """What the text prints. Fails when it raises."""
        done = self(text)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="session")
def fresh() -> Fresh:
    return Fresh()
