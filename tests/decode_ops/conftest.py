"""One thread for small cases, and the tiny models of the parallel tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "parallel"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Threads that wait for each other take longer than the work of a small case."""
    torch.set_num_threads(1)
