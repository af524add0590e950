"""On a GPU machine, in one call: the memory-bound operators timed, then every operator checked.

    PYTHONPATH=src python .ci/cuda_operators.py FOLDER

Writes FOLDER/NAME.json for each timed operator (and NAME.png where matplotlib is installed) and FOLDER/check.json. What
does not fit into --seconds is printed as left out. Exits 1 when anything is wrong or left out. `--plot-only` draws the
PNGs from the JSON of another machine. Needs neither click nor rich.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

TIMED = ("rms_norm", "silu_and_mul", "per_token_group_quant_fp8", "moe_topk_softmax", "moe_topk_sigmoid")
SEED = 20_260
WORKERS = 8
THREADS_PER_WORKER = 2
FAILURES_SHOWN = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--platform", default="cuda")
    parser.add_argument("--seconds", type=float, default=280.0)
    parser.add_argument("--time", nargs="*", default=TIMED, metavar="OP", help="operators to time")
    parser.add_argument("--check", nargs="*", metavar="OP", help="operators to check; all of them when omitted")
    parser.add_argument("--plot-only", action="store_true")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.plot_only:
        plot(given.folder.glob("*.json"))
        return 0
    deadline_s = time.monotonic() + given.seconds
    # Timed alone; the checks that follow compile on all cores at once.
    outcomes = [time_operator(op, given.platform, given.folder, deadline_s) for op in given.time]
    outcomes.append(check_operators(given.check, given.platform, given.folder, deadline_s))
    return 0 if all(outcomes) else 1


def time_operator(op: str, platform: str, folder: Path, deadline_s: float) -> bool:
    from lockstep.bench.ops import bench

    if time.monotonic() > deadline_s:
        say(f"LEFT OUT: timing {op}")
        return False
    begin_s = time.monotonic()
    report, is_right = bench(op, platform=platform, seed=SEED)
    result = {**report.as_json(), "command": f"lockstep ops bench {op} --platform {platform} --seed {SEED}"}
    path = folder / f"{op}.json"
    write(path, result)
    say(f"{op}: {time.monotonic() - begin_s:.0f} s, {'right' if is_right else 'WRONG'}")
    for each in result["results"]["measurements"]:
        rate = f"{each['bytes_per_s'] / 1e9:7.1f} GB/s {each['share_of_limit']:4.0%}"
        say(f"  {each['size']:>6} {each['provider']:<13} {each['seconds']['median'] * 1e6:8.2f} us {rate}")
    for note in report.notes:
        say(f"  {note}")
    if importlib.util.find_spec("matplotlib"):
        plot([path])
    return is_right


def check_operators(ops: list[str] | None, platform: str, folder: Path, deadline_s: float) -> bool:
    from lockstep.ops.registry import contracts

    left = sorted(contracts() if ops is None else ops)
    reports = []
    with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
        running = pool.imap_unordered(check_one, [(platform, op) for op in left])
        for _ in range(len(left)):
            try:
                report = running.next(timeout=max(deadline_s - time.monotonic(), 0.1))
            except multiprocessing.TimeoutError:
                break
            except Exception as error:
                say(f"BROKEN: {type(error).__name__}: {error}")
                continue
            reports.append(report)
            left.remove(report["op"])
            show(report)
        pool.terminate()
    if left:
        say(f"NOT CHECKED: {', '.join(left)}")
    is_right = not left and all(report["passed"] for report in reports)
    write(folder / "check.json", {"platform": platform, "seed": SEED, "passed": is_right, "operators": reports})
    return is_right


def check_one(task: tuple[str, str]) -> dict[str, Any]:
    import torch

    from lockstep.ops.suite import check_all, select
    from lockstep.platforms.registry import pick_platform

    torch.set_num_threads(THREADS_PER_WORKER)
    platform, op = task
    family = pick_platform(platform)
    (report,) = check_all(select(family.capabilities(), op=op), family, SEED)
    return {**report.as_json(), "device": family.capabilities().device_name}


def show(report: dict[str, Any]) -> None:
    mutants = report["mutants"]
    rejected = f"{mutants['rejected']} of {mutants['total']} mutants rejected"
    say(f"{report['op']}: {'passed' if report['passed'] else 'FAILED'}, {rejected}")
    for kernel in report["kernels"]:
        failures = kernel["failures"]
        worst = kernel["worst_share"]
        error = "none is finite" if worst is None else f"{worst:.2f}"
        say(f"  {kernel['name']:<10} {kernel['cases']} cases, worst {error}, {len(failures)} failures")
        for text in failures[:FAILURES_SHOWN]:
            say(f"    {text[:300]}")


def plot(paths: Any) -> None:
    from lockstep.bench.ops_plot import draw

    for path in sorted(paths):
        result = json.loads(path.read_text("utf-8"))
        if result.get("results", {}).get("measurements"):
            draw(result, path.with_suffix(".png"))


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
