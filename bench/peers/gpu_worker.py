"""The process that measures: one engine, test after test, until all are done or one fails."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lockstep import LLM
from lockstep.bench.fingerprint import fingerprint
from lockstep.bench.workload import Job
from peers.gpu_engine import InProcess, limited, process_started_s
from peers.gpu_measures import Ceilings, Measurer
from peers.gpu_record import Record
from peers.gpu_workloads import WorkloadFile

IMPORTED_S = time.time()
CLOSE_S = 15.0
"""Time for an engine to end, which one that failed may never do."""
COUNTERS = ("num_steps", "num_preemptions")
"""Of the engine, over a whole test: a preemption says that the KV pool had no room for all requests at once."""
FIRST_JOB = Job(tuple(range(1, 129)), 1)


def work(arguments: argparse.Namespace, begin_s: float) -> bool:
    """Measures what the record does not have yet; false when a test failed, after which the engine is not trusted.

    `begin_s` is when this program's first line ran, in seconds since the epoch. Raises what starting the engine does.
    """
    file = WorkloadFile(arguments.workloads)
    options = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        **arguments.engine_args,
    }
    record = Record(arguments.out)
    record.content["engine_kwargs"] = options
    with tempfile.TemporaryDirectory() as folder:
        directory = file.write_model(arguments.model, Path(folder))
        engine = InProcess(partial(LLM, str(directory), **options))
        try:
            with limited(arguments.limit_s):
                found = _start(engine, begin_s, arguments.cache_state)
            # A process that takes over from one that failed finds warm caches: the first start is what counts.
            record.content = {**found, **record.content}
            record.content.setdefault("machine", fingerprint())
            record.save()
            print("STARTUP", json.dumps(found["startup"]), flush=True)
            measurer = Measurer(engine, file, arguments.model, _ceilings(arguments))
            if not _measure_all(engine, measurer, arguments, record):
                return False
            record.content["memory_at_end"] = [asdict(line) for line in engine.llm.memory_report()]
            record.save()
            return True
        finally:
            with limited(CLOSE_S):
                engine.close()


def _measure_all(engine: InProcess, measurer: Measurer, arguments: argparse.Namespace, record: Record) -> bool:
    for name in record.missing(arguments.tests):
        if time.time() > arguments.until:
            record.put(name, {"skipped": "out of time"})
            continue
        record.begin(name)
        before = engine.llm.stats()
        try:
            with limited(arguments.limit_s):
                figures = measurer.measure(measurer.file.workload(name))
        except Exception as error:
            record.put(name, {"error": f"{type(error).__name__}: {error}"})
            return False
        after = engine.llm.stats()
        for counter in COUNTERS:
            figures[counter] = getattr(after, counter) - getattr(before, counter)
        record.put(name, figures)
    return True


def _start(engine: InProcess, begin_s: float, cache_state: str) -> dict[str, Any]:
    """The engine's start, step by step, and how it was set up."""
    ready_s = time.time()
    llm = engine.llm
    constructed_s = time.time()
    engine.generate([FIRST_JOB])
    first_token_s = time.time()
    started_s = process_started_s()
    return {
        "startup": {
            "cache_state": cache_state,
            "process_start_to_first_token_s": first_token_s - started_s,
            "interpreter_to_main_s": begin_s - started_s,
            "import_s": IMPORTED_S - begin_s,
            "construct_engine_s": constructed_s - ready_s,
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
