"""A million random steps of scheduler and page index, checked after each."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any

from test_scheduler_random import MUST_HAPPEN, STEPS_PER_EPISODE, run_episodes

from evidence.part import Findings, Part
from peers.markdown import table

STEPS_EACH = 500_000
CHECKED = (
    "after every plan, result and abort: each page has exactly one owner; locks, page tables, places in the queue and "
    "totals agree (`Scheduler.check`)",
    "at every step: each row reads slots that hold its own sequence's tokens, no page in use is written to by another "
    "sequence, and nobody is left without a row (a simulated executor that hashes prefixes)",
    "of every request: its tokens are those that were sampled, in order; it ends once, for the right reason, with as "
    "many tokens as asked",
    "at the end of every episode: no page in use, nothing leaked, all totals add up",
)


def collect(steps_each: int = STEPS_EACH) -> Findings:
    """Half with results in turn, half with results a step late. Raises what the first contradiction raises."""
    first_seed = secrets.randbelow(2**31)
    print(f"seeds from {first_seed}", flush=True)
    runs: list[dict[str, Any]] = []
    for way, overlap in (("in turn", False), ("a step late", True)):
        begin_s = time.perf_counter()
        seen = run_episodes(steps_each, first_seed, overlap=overlap)
        seconds = time.perf_counter() - begin_s
        runs.append({"results": way, "asked": steps_each, "seconds": round(seconds, 1), "seen": dict(seen)})
    return {
        "passed": all(run["seen"]["steps"] >= steps_each for run in runs),
        "first_seed": first_seed,
        "num_episodes_each": -(-steps_each // STEPS_PER_EPISODE),
        "runs": runs,
    }


def page(found: Mapping[str, Any]) -> str:
    names = ("steps", *MUST_HAPPEN, "planned ahead", "discarded rows")
    columns = [[run["results"], *(f"{run['seen'].get(name, 0):,}" for name in names)] for run in found["runs"]]
    rows = [["results come", *names], *columns]
    seconds = sum(run["seconds"] for run in found["runs"])
    first, num_episodes = found["first_seed"], found["num_episodes_each"]
    return "\n".join(
        [
            f"Seeds {first} to {first + num_episodes - 1}, an episode each with its own limits and pools, both ways: "
            f"{seconds:.0f} s in all, no contradiction. Checked:",
            "",
            *(f"- {line};" for line in CHECKED[:-1]),
            f"- {CHECKED[-1]}.",
            "",
            "How often what happened:",
            "",
            table([list(row) for row in zip(*rows, strict=True)]),
        ]
    )


PART = Part("scheduler", "A million random steps of scheduler and page index", collect, page)
