"""`lockstep serve` as processes of its own, and streamed requests that arrive at random times."""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lockstep.bench.figures import percentile
from lockstep.bench.http_load import Exchange, LoadGenerator
from lockstep.bench.processes import lockstep_command, running_server
from lockstep.bench.workload import Job
from lockstep.config import gather
from lockstep.core.errors import LockstepError
from peers.gpu_engine import limited
from peers.gpu_record import Record
from peers.gpu_workloads import WorkloadFile

MOST_WARM_UP_REQUESTS = 64
FIRST_JOB = Job(tuple(range(1, 129)), 1)


def serve(arguments: argparse.Namespace) -> None:
    """Starts `lockstep serve`, says how long that took, and loads it at each rate.

    Raises LockstepError when the server does not start, or answers a request with an error.
    """
    file = WorkloadFile(arguments.workloads)
    record = Record(arguments.out)
    with tempfile.TemporaryDirectory() as folder:
        directory = file.write_model(arguments.model, Path(folder), tokenizer=True)
        command = _command(directory, arguments.model, arguments.engine_args)
        begin_s = time.time()
        with limited(arguments.limit_s), running_server(command) as url:
            ready_s = time.time() - begin_s
            asyncio.run(_load(url, arguments.model, [FIRST_JOB], [0.0]))
            record.content["startup"] = {
                "cache_state": arguments.cache_state,
                "process_start_to_healthy_s": ready_s,
                "process_start_to_first_token_s": time.time() - begin_s,
            }
            record.save()
            print("STARTUP", json.dumps(record.content["startup"]), flush=True)
            if arguments.client is not None:
                _load_by_peer(arguments, url, Path(folder), record)
            else:
                for rate in arguments.rates:
                    record.put(_name(rate), _measure(url, file, arguments.model, rate))


def serving_figures(exchanges: Sequence[Exchange], rate: float) -> dict[str, Any]:
    """Times in milliseconds: to the first text, between texts, per token after the first, and of whole answers.

    Raises LockstepError when a request failed.
    """
    for found in exchanges:
        if found.error is not None or not found.piece_s:
            raise LockstepError(f"a request failed: {found.error or 'an answer without text'}")
    ends_s = [found.piece_s[-1] for found in exchanges]
    span_s = max(ends_s) - min(found.begin_s for found in exchanges)
    num_tokens = sum(found.num_output_tokens for found in exchanges)
    after_first = [
        (end_s - found.piece_s[0]) / (found.num_output_tokens - 1)
        for found, end_s in zip(exchanges, ends_s, strict=True)
        if found.num_output_tokens > 1
    ]
    return {
        "kind": "serving",
        "rate": str(rate),
        "requests": len(exchanges),
        "tokens_out": num_tokens,
        "span_s": span_s,
        "output_tokens_per_s": num_tokens / span_s,
        "requests_per_s": len(exchanges) / span_s,
        "ttft_ms": _spread_ms([found.ttft_s for found in exchanges]),
        "itl_ms": _spread_ms([gap_s for found in exchanges for gap_s in found.gaps_s]),
        "tpot_ms": _spread_ms(after_first),
        "e2e_ms": _spread_ms([end_s - found.begin_s for found, end_s in zip(exchanges, ends_s, strict=True)]),
    }


def _command(directory: Path, name: str, engine_args: dict[str, Any]) -> list[str]:
    options = {
        "model": str(directory),
        "served_model_name": name,
        "host": "127.0.0.1",
        "port": 0,
        "load_format": "dummy",
        "dtype": "bfloat16",
        **engine_args,
    }
    return lockstep_command("serve", gather(options))


def _measure(url: str, file: WorkloadFile, model: str, rate: float) -> dict[str, Any]:
    """One load, after a warm-up by other requests, with an empty prefix cache."""
    workload = file.serving()
    warmup = workload.warmup[:MOST_WARM_UP_REQUESTS]
    asyncio.run(_load(url, model, warmup, [0.0] * len(warmup)))
    urllib.request.urlopen(urllib.request.Request(f"{url}/flush_cache", method="POST"), timeout=30).close()
    arrivals_s = file.arrivals_s(len(workload.jobs), rate)
    exchanges = asyncio.run(_load(url, model, workload.jobs, arrivals_s))
    return {**serving_figures(exchanges, rate), "digest": workload.digest}


async def _load(url: str, model: str, jobs: Sequence[Job], arrivals_s: Sequence[float]) -> list[Exchange]:
    async with LoadGenerator(url) as generator:
        return await generator.run(model, jobs, concurrency=None, arrivals_s=arrivals_s)


def _load_by_peer(arguments: argparse.Namespace, url: str, folder: Path, record: Record) -> None:
    """Lets the peer's own client load our server, so that both servers are measured by the same one."""
    out = folder / "client.json"
    rates = ",".join(str(rate) for rate in arguments.rates)
    command = [sys.executable, str(arguments.client), "client", "--url", url, "--model", arguments.model]
    code = subprocess.call([*command, "--rates", rates, "--out", str(out)], stdout=subprocess.DEVNULL)
    tests = json.loads(out.read_text())["tests"] if out.is_file() else {}
    for rate in arguments.rates:
        lost = {"error": f"{arguments.client.name} ended with exit code {code}"}
        record.put(_name(rate), tests.get(_name(rate), lost))


def _name(rate: float) -> str:
    return f"serving_rate_{rate}"


def _spread_ms(values_s: Sequence[float]) -> dict[str, float]:
    if not values_s:
        return {"n": 0}
    return {
        "n": len(values_s),
        "mean": statistics.fmean(values_s) * 1e3,
        "median": statistics.median(values_s) * 1e3,
        "p99": percentile(values_s, 99) * 1e3,
        "max": max(values_s) * 1e3,
    }
