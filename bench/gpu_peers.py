"""Lockstep on one GPU under workloads that other engines run too, and the results of both side by side.

    python bench/gpu_peers.py ours --workloads FILE --model NAME --out ours.json
    python bench/gpu_peers.py report --ours ours.json --peer vllm.json

FILE lists models and requests (`peers/gpu_workloads.py` says how). The models have random weights, made on the device
from a config.json alone; prompts are token ids. The JSON is written anew after every test, so a run that is cut off
keeps what it had; a test that fails or takes too long is noted, and the next one gets a new engine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

BEGIN_S = time.time()

from lockstep import LLM, __version__  # noqa: E402 - what importing takes is part of what is measured
from lockstep.bench.fingerprint import fingerprint  # noqa: E402
from lockstep.bench.workload import Job  # noqa: E402
from lockstep.core.errors import LockstepError  # noqa: E402
from peers.gpu_engine import InProcess, limited, process_started_s  # noqa: E402
from peers.gpu_measures import Ceilings, Measurer  # noqa: E402
from peers.gpu_tables import markdown  # noqa: E402
from peers.gpu_workloads import WorkloadFile  # noqa: E402

IMPORTED_S = time.time()
H100_FLOPS_PER_S = 989.4e12
"""Dense bfloat16 products of an H100 SXM, by NVIDIA's datasheet."""
FIRST_JOB = Job(tuple(range(1, 129)), 1)


class Record:
    """A run's JSON, rewritten at each change and never half written."""

    def __init__(self, path: Path, **head: Any) -> None:
        self.path = path
        self.content: dict[str, Any] = {**head, "tests": {}}

    def put(self, test: str, figures: dict[str, Any]) -> None:
        self.content["tests"][test] = figures
        self.save()
        print("RESULT", test, json.dumps(figures), flush=True)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".part")
        scratch.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(scratch, self.path)


def ours(arguments: argparse.Namespace) -> None:
    """Starts the engine, says how long that took, then measures test after test."""
    file = WorkloadFile(arguments.workloads)
    names = arguments.tests.split(",") if arguments.tests is not None else file.names()
    workloads = [file.workload(name) for name in names if name]
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16"}
    options |= json.loads(arguments.engine_args)
    record = Record(
        arguments.out, engine="lockstep", engine_version=__version__, model=arguments.model, tag=arguments.tag
    )
    with tempfile.TemporaryDirectory() as folder:
        directory = file.write_model(arguments.model, Path(folder))
        engine = InProcess(partial(LLM, str(directory), **options))
        try:
            with limited(arguments.limit_s):
                record.content |= _start(engine, arguments.cache_state)
            record.content |= {"engine_kwargs": options, "machine": fingerprint()}
            record.save()
            print("STARTUP", json.dumps(record.content["startup"]), flush=True)
            ceilings = _ceilings(arguments)
            measurer = Measurer(engine, file, arguments.model, ceilings)
            for workload in workloads:
                if time.time() - process_started_s() > arguments.budget_s:
                    record.put(workload.name, {"skipped": "out of time"})
                    continue
                try:
                    with limited(arguments.limit_s):
                        record.put(workload.name, measurer.measure(workload))
                except Exception as error:
                    record.put(workload.name, {"error": f"{type(error).__name__}: {error}"})
                    engine.close()
        finally:
            engine.close()
    print("DONE", arguments.model, flush=True)


def report(arguments: argparse.Namespace) -> None:
    """Prints the tables, and writes them too if told where."""
    text = markdown(
        [json.loads(path.read_text()) for path in arguments.ours],
        [json.loads(path.read_text()) for path in arguments.peer],
    )
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")


def _start(engine: InProcess, cache_state: str) -> dict[str, Any]:
    """The engine's start, step by step, and how it was set up."""
    begin_s = time.time()
    llm = engine.llm
    constructed_s = time.time()
    engine.generate([FIRST_JOB])
    first_token_s = time.time()
    started_s = process_started_s()
    return {
        "startup": {
            "cache_state": cache_state,
            "process_start_to_first_token_s": first_token_s - started_s,
            "interpreter_to_main_s": BEGIN_S - started_s,
            "import_s": IMPORTED_S - BEGIN_S,
            "construct_engine_s": constructed_s - begin_s,
            "first_token_s": first_token_s - constructed_s,
        },
        "settings": {
            part: values for part, values in asdict(llm.config).items() if part not in ("model", "server")
        },
        "memory": [asdict(line) for line in llm.memory_report()],
        "kernels": {one.op: one.kernel.provider for one in llm.kernel_report()},
    }


def _ceilings(arguments: argparse.Namespace) -> Ceilings:
    """The card's datasheet, and what a probe measured on it (JSON with copy_bytes_per_s and gemm_flops_per_s)."""
    measured = json.loads(arguments.ceilings.read_text()) if arguments.ceilings is not None else {}
    return Ceilings(
        arguments.datasheet_flops, measured.get("copy_bytes_per_s"), measured.get("gemm_flops_per_s")
    )


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("ours", help=ours.__doc__)
    run.set_defaults(do=ours)
    run.add_argument("--workloads", type=Path, required=True, help="The file that lists models and requests.")
    run.add_argument("--model", required=True, help="Its name in that file.")
    run.add_argument("--out", type=Path, required=True, help="JSON to write.")
    run.add_argument("--tests", help="Names, with commas between; omitted: all; empty: the start alone.")
    run.add_argument("--tag", default="", help="What to tell this run from others by.")
    run.add_argument("--engine-args", default="{}", metavar="JSON", help="Options for LLM(...).")
    run.add_argument(
        "--cache-state", default="unknown", help="Whether compiled kernels were there: cold, warm."
    )
    run.add_argument("--ceilings", type=Path, metavar="JSON", help="What a probe measured on the card.")
    run.add_argument(
        "--datasheet-flops", type=float, default=H100_FLOPS_PER_S, help="Operations/s by the datasheet."
    )
    run.add_argument("--limit-s", type=float, default=120.0, help="Time for one test, or for the start.")
    run.add_argument("--budget-s", type=float, default=float("inf"), help="Time after which no test begins.")
    table = commands.add_parser("report", help=report.__doc__)
    table.set_defaults(do=report)
    table.add_argument("--ours", type=Path, nargs="+", required=True, help="JSON of `ours`.")
    table.add_argument("--peer", type=Path, nargs="*", default=[], help="JSON of others, of the same shape.")
    table.add_argument("--out", type=Path, help="Markdown to write.")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        arguments.do(arguments)
    except (LockstepError, OSError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
