"""On a GPU machine, in one call: every operator checked, then the ones that bound a model's speed timed.

    PYTHONPATH=src python .ci/cuda_operators.py FOLDER

Writes FOLDER/check.json, FOLDER/check.md, and for each timed operator FOLDER/NAME.json, NAME.png (where matplotlib is
installed) and its section of FOLDER/README.md. Checks run, and compile, in several processes at once, together with a
first call of everything that is timed later, so that the timing alone finds its programs in the caches on disk. What
does not fit into --seconds is printed as left out. Exits 1 when anything is wrong or left out. `--draw-only` makes the
pictures and the pages from the JSON of another machine. Needs neither click nor rich.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lockstep.ops.check import KernelReport

TIMED = (
    "moe_topk_softmax",
    "moe_topk_sigmoid",
    "rms_norm",
    "silu_and_mul",
    "per_token_group_quant_fp8",
    "attention_decode",
    "attention_decode_shared",
    "attention_extend",
    "fused_moe",
)
SIZES = {
    "attention_decode": (1, 4, 16, 64),
    "attention_decode_shared": (4, 16, 64),
    "attention_extend": (128, 512, 2048),
    "fused_moe": (1, 16, 256, 1024),
}
"""Of operators whose largest sizes take the host long to make."""
SEED = 20_260
CASES_AT_ONCE = 24
CHECK_SHARE = 0.6
"""Of the seconds, for checks; the rest is for timing."""
FAILURES_SHOWN = 3

Task = tuple[str, str, str, int, int]
"""What to do ("check", "mutants" or "warm"), operator, kernel, and which part of how many; or the size to warm up."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--platform", default="cuda")
    parser.add_argument("--seconds", type=float, default=175.0)
    parser.add_argument("--workers", type=int, default=min(max((os.cpu_count() or 1) - 2, 1), 12))
    parser.add_argument("--time", nargs="*", default=TIMED, metavar="OP", help="operators to time")
    parser.add_argument("--check", nargs="*", metavar="OP", help="operators to check; all of them when omitted")
    parser.add_argument("--draw-only", action="store_true")
    given = parser.parse_args()
    folder: Path = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    if given.draw_only:
        draw_pages(folder)
        return 0
    begin_s = time.monotonic()
    is_right = check_operators(given, begin_s + CHECK_SHARE * given.seconds)
    say(f"checked after {time.monotonic() - begin_s:.0f} s")
    for op in given.time:
        is_right &= time_operator(op, given.platform, folder, begin_s + given.seconds)
    draw_pages(folder)
    say(f"done after {time.monotonic() - begin_s:.0f} s")
    return 0 if is_right else 1


def check_operators(given: argparse.Namespace, deadline_s: float) -> bool:
    """Every kernel that the device can run, in parts, and every mutant; what is timed later runs once."""
    from lockstep.bench.fingerprint import fingerprint
    from lockstep.ops.suite import OperatorReport, select
    from lockstep.platforms.registry import pick_platform

    machine = fingerprint()
    family = pick_platform(given.platform)
    ops = [None] if given.check is None else given.check
    selection = [each for op in ops for each in select(family.capabilities(), op=op)]
    tasks = [task for each in selection for task in tasks_of(each)]
    done = run_tasks(given, [*tasks, *warming(given.time)], deadline_s)
    left = [task for task in tasks if task not in done]
    reports = []
    for each in selection:
        name = each.contract.name
        by_kernel = [
            [found for task, found in done.items() if task[:3] == ("check", name, kernel.provider)]
            for kernel in each.kernels
        ]
        kernels = tuple(joined(parts) for parts in by_kernel if parts)
        accepted = tuple(done.get(("mutants", name, "", 0, 1), ()))
        reports.append(OperatorReport(name, kernels, each.not_run, len(each.contract.mutants), accepted))
    passed = not left and all(report.passed for report in reports)
    for _, op, kernel, part, num_parts in left:
        say(f"NOT CHECKED: {op}.{kernel or 'mutants'}, part {part + 1} of {num_parts}")
    result = {
        "platform": family.name,
        "device": family.capabilities().device_name,
        "seed": SEED,
        "passed": passed,
        "left_out": [list(task) for task in left],
        "machine": machine,
        "operators": [report.as_json() for report in reports],
    }
    write(given.folder / "check.json", result)
    say(check_page(result))
    return passed


def tasks_of(selected: Any) -> list[Task]:
    """One for the mutants, and for each kernel one for every so many cases."""
    num_parts = -(-sum(1 for _ in selected.contract.cases()) // CASES_AT_ONCE)
    name = selected.contract.name
    checks = [
        ("check", name, kernel.provider, part, num_parts)
        for kernel in selected.kernels
        for part in range(num_parts)
    ]
    return [*checks, ("mutants", name, "", 0, 1)]


def warming(ops: Iterable[str]) -> list[Task]:
    from lockstep.bench.ops_measure import workload_of

    return [("warm", op, "", size, 0) for op in ops for size in SIZES.get(op, workload_of(op)[1].sizes)]


def run_tasks(given: argparse.Namespace, tasks: list[Task], deadline_s: float) -> dict[Task, Any]:
    """What came of each task until the deadline. The first to go are those that compile most."""

    def is_plain(task: Task) -> bool:
        return task[2] in ("", "torch", "reference") and task[0] != "warm"

    done: dict[Task, Any] = {}
    with multiprocessing.get_context("spawn").Pool(given.workers) as pool:
        ordered = sorted(tasks, key=is_plain)
        running = pool.imap_unordered(run_task, [(given.platform, task) for task in ordered])
        for _ in ordered:
            try:
                task, found = running.next(timeout=max(deadline_s - time.monotonic(), 0.1))
            except multiprocessing.TimeoutError:
                break
            if isinstance(found, str):
                say(f"BROKEN: {task}: {found}")
            else:
                done[task] = found
        pool.terminate()
    return done


def run_task(given: tuple[str, Task]) -> tuple[Task, Any]:
    """The task and what came of it; a text is an error's."""
    import torch

    from lockstep.platforms.registry import pick_platform

    torch.set_num_threads(1)
    platform, task = given
    family = pick_platform(platform)
    try:
        return task, {"check": check_part, "mutants": mutants_of, "warm": warm}[task[0]](
            pick_platform(platform), task
        )
    except Exception as error:
        return task, f"{type(error).__name__}: {error}"[:500]
    finally:
        # The device's memory is shared with the other processes.
        family.release_unused()


def check_part(family: Any, task: Task) -> KernelReport:
    from lockstep.ops.check import check_kernel
    from lockstep.ops.registry import contracts, kernels
    from lockstep.ops.suite import device_with_values

    _, op, provider, part, num_parts = task
    contract = contracts()[op]
    some = replace(contract, cases=lambda: islice(contract.cases(), part, None, num_parts))
    kernel = next(kernel for kernel in kernels(op) if kernel.provider == provider)
    return check_kernel(some, kernel, seed=SEED, device=device_with_values(family))


def mutants_of(family: Any, task: Task) -> list[str]:
    from lockstep.ops.check import check_mutants
    from lockstep.ops.registry import contracts

    return check_mutants(contracts()[task[1]], SEED)


def warm(family: Any, task: Task) -> list[str]:
    """Times one size for nothing but the programs that it leaves on disk."""
    import torch

    from lockstep.bench.ops_measure import measure, providers_of, workload_of

    _, op, _, size, _ = task
    contract, workload = workload_of(op)
    with torch.inference_mode():
        measure(contract, workload, providers_of(contract, timed_providers(op)), family, (size,), SEED)
    return []


def joined(parts: list[KernelReport]) -> KernelReport:
    """One report of all parts of a kernel's cases."""
    worst = max(parts, key=lambda part: part.worst_share)
    return replace(
        worst,
        num_cases=sum(part.num_cases for part in parts),
        refused=tuple(each for part in parts for each in part.refused),
        failures=tuple(each for part in parts for each in part.failures),
    )


def timed_providers(op: str) -> list[str] | None:
    """None for all. The references of some operators loop over values on the host: that is not for torch.compile."""
    from lockstep.ops.registry import kernels

    return [kernel.provider for kernel in kernels(op)] if op in SIZES else None


def time_operator(op: str, platform: str, folder: Path, deadline_s: float) -> bool:
    from lockstep.bench.ops import bench

    if time.monotonic() > deadline_s:
        say(f"LEFT OUT: timing {op}")
        return False
    begin_s = time.monotonic()
    providers, sizes = timed_providers(op), SIZES.get(op)
    report, is_right = bench(op, providers=providers, platform=platform, sizes=sizes, seed=SEED)
    options = (
        f" --sizes {','.join(map(str, sizes))} --providers {','.join(providers)}" if sizes and providers else ""
    )
    command = f"lockstep ops bench {op} --platform {platform} --seed {SEED}{options}"
    result = {**report.as_json(), "command": command}
    write(folder / f"{op}.json", result)
    say(f"{op}: {time.monotonic() - begin_s:.0f} s, {'right' if is_right else 'WRONG'}")
    for each in result["results"]["measurements"]:
        rate = f"{each['bytes_per_s'] / 1e9:7.1f} GB/s {each['share_of_limit']:4.0%}"
        say(f"  {each['size']:>6} {each['provider']:<13} {each['seconds']['median'] * 1e6:8.2f} us {rate}")
    for note in report.notes:
        say(f"  {note}")
    return is_right


def draw_pages(folder: Path) -> None:
    """Pictures and pages from the JSON that is there."""
    from lockstep.bench.ops_page import markdown
    from lockstep.bench.ops_plot import draw

    sections = ["# Operators, timed\n"]
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text("utf-8"))
        if "operators" in result:
            path.with_suffix(".md").write_text(check_page(result), "utf-8")
            sections.append(f"[Each kernel against its contract]({path.stem}.md).\n")
        elif result["results"]["measurements"]:
            picture = path.with_suffix(".png")
            if importlib.util.find_spec("matplotlib"):
                draw(result, picture)
            sections.append(markdown(result, picture=picture.name if picture.exists() else None))
    (folder / "README.md").write_text("\n".join(sections), "utf-8")


def check_page(result: dict[str, Any]) -> str:
    """What `ops check` found, as Markdown: a line for each kernel, then every failure's beginning."""
    from lockstep.bench.fingerprint import describe

    lines = ["# Operators, checked", "", *describe(result["machine"]), ""]
    lines += ["Errors are shares of what the contract accepts.", ""]
    lines += ["| operator | mutants rejected | kernel | cases | refused | worst error | outcome |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for report in result["operators"]:
        mutants = f"{report['mutants']['rejected']} of {report['mutants']['total']}"
        for kernel in report["kernels"]:
            worst = "not finite" if kernel["worst_share"] is None else f"{kernel['worst_share']:.2f}"
            outcome = "passed" if kernel["passed"] else f"{len(kernel['failures'])} failures"
            cells = (
                report["op"],
                mutants,
                kernel["name"],
                kernel["cases"],
                len(kernel["refused"]),
                worst,
                outcome,
            )
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines.append("")
    for report in result["operators"]:
        lines += [
            f"- {report['op']}.{each['kernel']} did not run: {each['reason']}" for each in report["not_run"]
        ]
        lines += [f"- {report['op']} accepts a mutant: {text}" for text in report["mutants"]["accepted"]]
        for kernel in report["kernels"]:
            wrong = kernel["failures"][:FAILURES_SHOWN]
            lines += [f"- {report['op']}.{kernel['name']}: {text[:300]}" for text in wrong]
    lines += [f"- left out: {' '.join(map(str, task))}" for task in result["left_out"]]
    verdict = "passed" if result["passed"] else "failed"
    return "\n".join([*lines, "", f"{verdict} on {result['device']} with seed {result['seed']}", ""])


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
