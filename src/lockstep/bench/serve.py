"""Latency and throughput over HTTP, of a running server or of one that lives for the measure."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lockstep.bench.figures import percentile
from lockstep.bench.fingerprint import fingerprint
from lockstep.bench.http_load import Exchange, LoadGenerator, ServedModel, poisson_arrivals
from lockstep.bench.processes import lockstep_command, running_server
from lockstep.bench.report import Report, shown
from lockstep.bench.workload import FileWorkload, Job, Workload, choose_workload
from lockstep.config import Given, gather, wanted
from lockstep.core.errors import ConfigError

DEFAULT_CONCURRENCY = 16
PERCENTS = (50, 90, 99)
MAX_SHOWN_ERRORS = 3
_WARM_UP = Job("Hello", 8)
_ANY_LOCAL_PORT = {"host": Given("127.0.0.1", "derived"), "port": Given(0, "derived")}


def main(
    options: Mapping[str, Given],
    *,
    url: str | None,
    num_requests: int | None,
    concurrency: int | None,
    rate: float | None,
    input_tokens: int | None,
    output_tokens: int | None,
    workload: Path | None,
    seed: int,
    json_out: Path | None,
) -> int:
    """Measures, prints and returns the exit code: 1 when a request failed.

    `rate` sends requests at random times, so many per second on average; else `concurrency` are kept under way.
    """
    if url is not None and options:
        raise ConfigError("MODEL and engine options belong to the server that --url names; leave them out here")
    if rate is not None and concurrency is not None:
        raise ConfigError("--rate and --concurrency exclude each other: say when to send, or how many at once")
    asked = choose_workload(
        workload, seed=seed, num_requests=num_requests, input_tokens=input_tokens, output_tokens=output_tokens
    )
    pacing = {"rate": rate} if rate is not None else {"concurrency": concurrency or DEFAULT_CONCURRENCY}
    api_key = wanted(gather({}), "api_key")
    machine = fingerprint()
    command = lockstep_command("serve", {**options, **_ANY_LOCAL_PORT})
    with running_server(command) if url is None else nullcontext(url) as address:
        model, exchanges = asyncio.run(_load(address, api_key, asked, seed=seed, **pacing))
    results = _results(exchanges)
    failed = [found.error for found in exchanges if found.error is not None]
    Report(
        benchmark="serve",
        machine=machine,
        model={"name": model.name},
        workload={**asked.describe(), **pacing, "seed": seed},
        columns=["", *(f"p{percent}" for percent in PERCENTS)],
        rows=_rows(results),
        results=results,
        notes=[_totals(results), *(f"failed: {error}" for error in failed[:MAX_SHOWN_ERRORS])],
    ).publish(json_out)
    return 1 if failed else 0


async def _load(
    url: str,
    api_key: str | None,
    asked: Workload,
    *,
    seed: int,
    concurrency: int | None = None,
    rate: float | None = None,
) -> tuple[ServedModel, list[Exchange]]:
    async with LoadGenerator(url, api_key=api_key) as generator:
        model = await generator.served_model()
        if model.vocab_size is None and not isinstance(asked, FileWorkload):
            raise ConfigError(
                f"{url} does not tell its vocabulary (/model_info): give the prompts with --workload"
            )
        jobs = next(asked.batches(model.vocab_size or 0))
        await generator.run(model.name, [_WARM_UP], concurrency=1)
        arrivals_s = None if rate is None else poisson_arrivals(len(jobs), rate, seed)
        return model, await generator.run(model.name, jobs, concurrency=concurrency, arrivals_s=arrivals_s)


def _results(exchanges: Sequence[Exchange]) -> dict[str, Any]:
    """Percentiles over whole answers, rates over the time from the first request to the last answer."""
    whole = [found for found in exchanges if found.error is None and found.piece_s]
    seconds = max(found.end_s for found in exchanges) - min(found.begin_s for found in exchanges)
    num_output_tokens = sum(found.num_output_tokens for found in whole)
    num_prompt_tokens = sum(found.num_prompt_tokens for found in whole)
    return {
        "num_completed": len(whole),
        "num_failed": sum(found.error is not None for found in exchanges),
        "seconds": seconds,
        "num_prompt_tokens": num_prompt_tokens,
        "num_output_tokens": num_output_tokens,
        "output_tokens_per_s": num_output_tokens / seconds,
        "total_tokens_per_s": (num_prompt_tokens + num_output_tokens) / seconds,
        "requests_per_s": len(whole) / seconds,
        "ttft_s": _percentiles([found.ttft_s for found in whole]),
        "itl_s": _percentiles([gap_s for found in whole for gap_s in found.gaps_s]),
        "e2e_s": _percentiles([found.e2e_s for found in whole]),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    return {f"p{percent}": percentile(values, percent) for percent in PERCENTS} if values else None


def _rows(results: Mapping[str, Any]) -> list[list[str]]:
    names = {"ttft_s": "time to first token, ms", "itl_s": "between tokens, ms", "e2e_s": "whole answer, ms"}
    return [
        [name, *(shown(value * 1e3) for value in results[key].values())]
        for key, name in names.items()
        if results[key] is not None
    ]


def _totals(results: Mapping[str, Any]) -> str:
    return (
        f"{results['num_completed']} completed, {results['num_failed']} failed in {results['seconds']:.2f} s: "
        f"output {shown(results['output_tokens_per_s'])} tokens/s, "
        f"prompt and output {shown(results['total_tokens_per_s'])} tokens/s, "
        f"{shown(results['requests_per_s'])} requests/s"
    )
