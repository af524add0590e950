"""How a mixture is computed for a number of tokens: the way, and the tiles of its two products.

What was measured on a device comes first: by `lockstep bench tune-moe` on this machine, then the tables that ship in
`tuned/`, one file a device. Any other problem gets what the rules below say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lockstep.core.errors import ConfigError, nearest
from lockstep.ops.grouped_gemm.tiles import DeviceFacts, Tile, default_tile, rows_of

Way = Literal["pairs", "tokens", "grouped"]
"""pairs: each token with each of its experts by itself, on vectors. tokens: each expert once, its rows all tokens.
grouped: pairs sorted by expert, in blocks of rows."""

WAYS: tuple[Way, ...] = ("pairs", "tokens", "grouped")
MOST_TOKENS_AS_ROWS = 64
"""Tokens that one program of the way "tokens" takes."""

_BUNDLED = Path(__file__).parent / "tuned"
_MEASURED_FOLDER = "fused_moe"
_DEFAULT_TOKENS_AS_ROWS = 32


class Problem(NamedTuple):
    """What decides a plan. Experts and inner size are those of the rank; elements have `itemsize` bytes."""

    num_tokens: int
    num_experts: int
    top_k: int
    width: int
    inner: int
    itemsize: int

    @property
    def num_pairs(self) -> int:
        """Tokens, each counted once for each of its experts."""
        return self.num_tokens * self.top_k


class Plan(NamedTuple):
    """A way and the tiles of the products into the inner size and out of it.

    Rows of a tile are 1 for "pairs", all tokens for "tokens" (a power of two from 16 on), and the same in both
    products for "grouped".
    """

    way: Way
    up: Tile
    down: Tile


class Measured(NamedTuple):
    """A plan that was measured to be best for a problem, and is taken for fewer tokens too."""

    problem: Problem
    plan: Plan

    def covers(self, problem: Problem) -> bool:
        """True for the same experts and no more tokens."""
        return problem[1:] == self.problem[1:] and problem.num_tokens <= self.problem.num_tokens


@lru_cache(maxsize=4096)
def plan_of(problem: Problem, device: DeviceFacts, measured_in: Path | None) -> Plan:
    """The measured plan of the device with the fewest tokens that cover the problem, or the default one.

    Raises ConfigError for a table that cannot be read.
    """
    folders = [_BUNDLED] if measured_in is None else [measured_in / _MEASURED_FOLDER, _BUNDLED]
    for folder in folders:
        for measured in table_of(folder / file_name(device.name)):
            if measured.covers(problem):
                return _with_rows(measured.plan, problem)
    return default_plan(problem, device.shared_bytes)


def default_plan(problem: Problem, shared_bytes: int) -> Plan:
    """The plan where nothing was measured.

    Pairs by themselves while two tokens rarely share an expert, then all tokens as rows, then groups.
    """
    if problem.num_tokens == 1 or problem.num_pairs <= problem.num_experts // 2:
        up, down = (
            Tile(1, 8, min(most, _power_of_two(inputs)), num_warps=4, num_stages=1)
            for inputs, most in ((problem.width, 512), (problem.inner, 1024))
        )
        return Plan("pairs", up, down)
    if problem.num_tokens <= _DEFAULT_TOKENS_AS_ROWS:
        tile = default_tile(rows_for(problem.num_tokens), problem.itemsize, shared_bytes)
        return Plan("tokens", tile, tile)
    tile = default_tile(rows_of(problem.num_pairs, problem.num_experts), problem.itemsize, shared_bytes)
    return Plan("grouped", tile, tile)


def rows_for(num_tokens: int) -> int:
    """Rows of a tile that hold all tokens: matrix units take 16 at least."""
    return max(16, _power_of_two(num_tokens))


def file_name(device_name: str) -> str:
    """The table of a device, such as nvidia_h100_80gb_hbm3.json."""
    return re.sub(r"\W+", "_", device_name).strip("_").lower() + ".json"


def measured_file(cache_dir: Path, device_name: str) -> Path:
    """Where what was measured on this machine is kept."""
    return cache_dir / _MEASURED_FOLDER / file_name(device_name)


@cache
def table_of(file: Path) -> tuple[Measured, ...]:
    """What `read_table` finds, read once in a process."""
    return read_table(file)


def read_table(file: Path) -> tuple[Measured, ...]:
    """Measured plans of a device, fewest tokens first; none where there is no file.

    The file is a list of {"problem": {...}, "plan": {"way": ..., "up": {...}, "down": {...}}}, each with the fields of
    the class of that name; what else an entry says is for readers. Raises ConfigError naming the file.
    """
    try:
        entries = json.loads(file.read_text())
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}; remove it and measure again") from None
    try:
        found = [_entry(entry) for entry in entries]
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{file} is no table of plans ({error}); remove it and measure again") from None
    return tuple(sorted(found, key=lambda measured: measured.problem.num_tokens))


def as_json(measured: Iterable[tuple[Measured, float]]) -> list[dict[str, Any]]:
    """Entries for a table, each with the microseconds that it took."""
    return [
        {
            "problem": found.problem._asdict(),
            "plan": {
                "way": found.plan.way,
                "up": found.plan.up._asdict(),
                "down": found.plan.down._asdict(),
            },
            "microseconds": round(microseconds, 2),
        }
        for found, microseconds in measured
    ]


def _entry(entry: Any) -> Measured:
    plan = entry["plan"]
    if plan["way"] not in WAYS:
        raise KeyError(f"unknown way {plan['way']!r}{nearest(str(plan['way']), WAYS)}")
    return Measured(Problem(**entry["problem"]), Plan(plan["way"], Tile(**plan["up"]), Tile(**plan["down"])))


def _with_rows(plan: Plan, problem: Problem) -> Plan:
    """The plan for fewer tokens than it was measured with: no more rows than they need."""
    if plan.way != "tokens":
        return plan
    rows = rows_for(problem.num_tokens)
    return Plan("tokens", plan.up._replace(rows=rows), plan.down._replace(rows=rows))


def _power_of_two(count: int) -> int:
    """The smallest one that is no smaller."""
    return 1 << max(0, count - 1).bit_length()
