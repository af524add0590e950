"""The helpers of neighbouring suites: tiny models in files, and layouts of every family."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

for suite in ("engine", "parallel"):
    sys.path.append(str(Path(__file__).parents[1] / suite))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
