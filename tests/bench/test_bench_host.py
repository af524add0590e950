"""The measure of the host's part of a step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lockstep.bench.host import PARTS, measure
from lockstep.cli.main import main

pytestmark = pytest.mark.suite("cpu", seconds=20)


def test_every_part_of_every_step_is_timed() -> None:
    cost = measure(3, prompt_tokens=20, num_steps=7)
    assert all(len(cost.parts_ms[part]) == 7 and min(cost.parts_ms[part]) > 0 for part in PARTS)
    assert cost.steps_ms == pytest.approx([sum(cost.parts_ms[part][at] for part in PARTS) for at in range(7)])


def test_the_figures_are_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten times what 256 requests take on one core of a small machine (0.33 ms) would be a fault."""
    out = tmp_path / "host.json"
    asked = ["--requests", "1", "--requests", "256", "--steps", "40", "--input-tokens", "100"]
    num_threads = torch.get_num_threads()
    assert main(["bench", "host", *asked, "--json", str(out)]) == 0
    assert torch.get_num_threads() == num_threads, "one thread computes, in the measure alone"
    printed = capsys.readouterr().out
    assert "256 requests" in printed and "whole step" in printed
    found = json.loads(out.read_text())["results"]["ms"]
    assert found["1"]["whole step"]["p50"] < found["256"]["whole step"]["p50"] < 3.3
    assert found["256"]["whole step"]["p99"] >= found["256"]["whole step"]["p50"]
