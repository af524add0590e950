"""The helpers of neighbouring suites: teacher-forced logits and small models over any mesh."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

for suite in ("model", "parallel", "engine", "decode_ops"):
    sys.path.append(str(Path(__file__).parents[1] / suite))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
