"""Time from the start of a process to its first token."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lockstep.bench.figures import Figure
from lockstep.bench.fingerprint import fingerprint
from lockstep.bench.processes import lockstep_command
from lockstep.bench.report import Report, figure_table
from lockstep.config import Given
from lockstep.core.errors import ConfigError

PROMPT = "What is the capital of Japan?"
TARGET_S = 6.0


@dataclass(frozen=True, slots=True)
class Start:
    """One `lockstep run` of one token. `first_token_s` counts from the start of the process until its answer was read.

    `load_s` and `answer_s` are the command's own times; what is left is the interpreter, imports and writing.
    """

    first_token_s: float
    load_s: float
    answer_s: float
    exit_s: float

    @property
    def rest_s(self) -> float:
        return self.first_token_s - self.load_s - self.answer_s


def main(options: Mapping[str, Given], *, repeats: int, json_out: Path | None) -> int:
    """Measures, prints and returns the exit code."""
    machine = fingerprint()
    starts = [measure_start(options) for _ in range(repeats)]

    def figure(name: str, values: list[float], at_most: float | None = None) -> Figure:
        return Figure(name=name, unit="s", values={"lockstep": values}, at_most=at_most)

    figures = [
        figure("process start to first token", [start.first_token_s for start in starts], TARGET_S),
        figure("loading the model", [start.load_s for start in starts]),
        figure("first token of a loaded model", [start.answer_s for start in starts]),
        figure("interpreter, imports, output", [start.rest_s for start in starts]),
        figure("process start to exit", [start.exit_s for start in starts]),
    ]
    columns, rows = figure_table(figures)
    Report(
        benchmark="startup",
        machine=machine,
        model={"name": str(options["model"].value) if "model" in options else "the embedded model"},
        workload={"prompt": PROMPT, "repeats": repeats},
        columns=columns,
        rows=rows,
        results={"figures": [found.as_json() for found in figures]},
    ).publish(json_out)
    return 0


def measure_start(options: Mapping[str, Given]) -> Start:
    """Runs `lockstep run --json` for one token, once. Raises ConfigError with its error when it fails."""
    command = lockstep_command("run", options, flags=["--json", "--max-tokens=1"], arguments=[PROMPT])
    begin_s = time.perf_counter()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        first_token_s = time.perf_counter() - begin_s
        error = process.stderr.read().strip()
        code = process.wait()
        exit_s = time.perf_counter() - begin_s
    if code != 0 or not line:
        raise ConfigError(
            f"`lockstep run` ended with exit code {code}: {error.removeprefix('error: ') or 'no answer'}"
        )
    timings = json.loads(line)["timings"]
    return Start(first_token_s, timings["load_s"], timings["ttft_s"], exit_s)
