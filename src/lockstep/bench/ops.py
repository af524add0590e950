"""`lockstep ops bench`: the kernels of one operator over its sizes, against what the machine can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lockstep.bench.fingerprint import fingerprint
from lockstep.bench.ops_limits import MachineLimits, measure_limits
from lockstep.bench.ops_measure import Measurements, measure, providers_of, workload_of
from lockstep.bench.ops_plot import draw, require_plotting
from lockstep.bench.ops_sizes import require_fitting
from lockstep.bench.report import Report, shown
from lockstep.ops.suite import device_with_values
from lockstep.platforms.registry import pick_platform


def main(
    op: str,
    *,
    providers: Sequence[str] | None,
    platform: str,
    sizes: Sequence[int] | None,
    seed: int,
    json_out: Path | None,
    plot_out: Path | None,
    on_size: Callable[[int], None] = lambda size: None,
) -> int:
    """Prints the table and writes what was asked for. Gives 1 when a kernel is wrong or none was timed, else 0.

    Raises ConfigError for a size that does not fit into memory.
    """
    if plot_out is not None:
        require_plotting()
    family = pick_platform(platform, "--platform")
    if sizes is not None:
        require_fitting(workload_of(op)[1], sizes, family)
    report, is_right = bench(
        op, providers=providers, platform=family.name, sizes=sizes, seed=seed, on_size=on_size
    )
    report.publish(json_out)
    if plot_out is not None:
        draw(report.as_json(), plot_out)
    return 0 if is_right else 1


def bench(
    op: str,
    *,
    providers: Sequence[str] | None = None,
    platform: str = "auto",
    sizes: Sequence[int] | None = None,
    seed: int = 0,
    on_size: Callable[[int], None] = lambda size: None,
) -> tuple[Report, bool]:
    """The measured operator as a report, and whether something was timed and nothing was wrong.

    Raises KernelError for names that are not known, ConfigError for a platform that is not here.
    """
    contract, workload = workload_of(op)
    kernels = providers_of(contract, providers)
    family = pick_platform(platform)
    device_with_values(family)
    machine = fingerprint()
    sizes = sizes or workload.sizes
    dtype: torch.dtype = workload.case(sizes[0]).signature["dtype"]
    with torch.inference_mode():
        has_flops = workload.num_flops is not None
        limits = measure_limits(family, flops_dtype=dtype if has_flops else None)
        found = measure(contract, workload, kernels, family, sizes, seed, on_size)
    columns, rows = _table(workload.axis, found, limits)
    report = Report(
        benchmark=f"ops bench {op}",
        machine=machine,
        model={"name": contract.summary},
        workload={"platform": family.name, "device": family.capabilities().device_name, "seed": seed},
        columns=columns,
        rows=rows,
        results=_results(op, workload.axis, found, limits),
        notes=_notes(found, limits),
    )
    return report, bool(found.done) and not found.wrong


def _table(axis: str, found: Measurements, limits: MachineLimits) -> tuple[list[str], list[list[str]]]:
    has_flops = limits.flops_per_s is not None
    columns = [
        axis,
        "provider",
        "microseconds",
        "GB/s",
        *(["TFLOP/s"] if has_flops else []),
        "of limit",
        "speedup",
    ]
    by_call = {(each.size, each.provider): each for each in found.done}
    rows, last = [], None
    for each in found.done:
        median_s = each.timing.seconds.median
        reference = by_call.get((each.size, "reference"))
        rows.append(
            [
                f"{each.size}" if each.size != last else "",
                each.provider,
                shown(median_s * 1e6),
                shown(each.num_bytes / median_s / 1e9),
                *([shown(each.num_flops / median_s / 1e12)] if has_flops else []),
                f"{each.share_of(limits):.0%}",
                f"{reference.timing.seconds.median / median_s:.2f}" if reference is not None else "",
            ]
        )
        last = each.size
    return columns, rows


def _notes(found: Measurements, limits: MachineLimits) -> list[str]:
    methods = dict.fromkeys(each.timing.method for each in found.done)
    above = {
        f"{each.provider} at {each.size}": each.is_cached(limits)
        for each in found.done
        if each.share_of(limits) > 1
    }
    cached, unexplained = ([who for who, fits in above.items() if fits is wanted] for wanted in (True, False))
    return [
        *limits.lines(),
        *([f"above 100%, all its calls fit the cache: {', '.join(cached)}"] if cached else []),
        *(
            [f"above 100% of what was measured to be the limit: {', '.join(unexplained)}"]
            if unexplained
            else []
        ),
        *(f"timed: calls on arguments of their own, {method}; median of the repeats" for method in methods),
        *(f"not run: {who}: {reason}" for who, reason in found.not_run.items()),
        *(f"WRONG, not timed: {who}: {reason}" for who, reason in found.wrong.items()),
    ]


def _results(op: str, axis: str, found: Measurements, limits: MachineLimits) -> dict[str, Any]:
    return {
        "op": op,
        "axis": axis,
        "limits": limits.as_json(),
        "measurements": [each.as_json(limits) for each in found.done],
        "not_run": found.not_run,
        "wrong": found.wrong,
    }
