"""What is to be reached on one H100 80GB, row by row: our figures against vLLM's, and the goals of both stages."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.bench.report import shown
from peers.gpu_tables import Result, figure_of
from peers.markdown import table

START = "process_start_to_first_token_s"
_MIXTURE, _LARGE, _SMALL = "qwen3-30b-a3b", "qwen3-8b", "qwen3-0.6b"


@dataclass(frozen=True)
class Goal:
    """A row. `test` names a test of a result, or the state of the caches at a start.

    `seen` is what vLLM 0.24.0 reached at its best setting in an earlier sitting (a range: the better end). `reach` and
    `then` are figures or, if `relative`, times the peer's; None stands for nothing beyond `reach`.
    """

    what: str
    model: str
    test: str
    key: str
    unit: str
    seen: float
    reach: float
    then: float | None
    higher_is_better: bool = False
    relative: bool = False

    def value(self, results: Sequence[Result]) -> float | None:
        """The median of the results that have the figure."""
        found = [value for result in results if (value := self._of(result)) is not None]
        return statistics.median(found) if found else None

    def best(self, peers: Sequence[Result], own: Sequence[Result]) -> float | None:
        """The best of the peers' results that have the figure, of the very requests that ours are of."""
        asked = {digest for result in own if (digest := self._digest(result)) is not None}
        same = [peer for peer in peers if self._digest(peer) in {None, *asked}]
        found = [value for peer in same if (value := self._of(peer)) is not None]
        return (max if self.higher_is_better else min)(found, default=None)

    def verdict(self, own: float, peer: float) -> str:
        """Which goals are reached, or by how much the first is missed."""
        met = [self._met(own, peer, goal) for goal in (self.reach, self.then) if goal is not None]
        if all(share >= 1 for share in met):
            return "reached" if len(met) == 1 else "both reached"
        return "first reached" if met[0] >= 1 else f"missed: {met[0]:.2f} of the first"

    @property
    def goals(self) -> str:
        """Both, as text."""
        unit = "x" if self.relative else ""
        return "; ".join(f"{goal:g}{unit}" for goal in (self.reach, self.then) if goal is not None)

    def _digest(self, result: Result) -> str | None:
        found: str | None = result["tests"].get(self.test, {}).get("digest")
        return found if result["model"] == self.model else None

    def _met(self, own: float, peer: float, goal: float) -> float:
        wanted = goal * peer if self.relative else goal
        return own / wanted if self.higher_is_better else wanted / own

    def _of(self, result: Result) -> float | None:
        if result["model"] != self.model:
            return None
        if self.key != START:
            return figure_of(result["tests"].get(self.test, {}), self.key)
        startup: dict[str, Any] = result.get("startup", {})
        is_server = "process_start_to_healthy_s" in startup
        return startup.get(START) if startup.get("cache_state") == self.test and not is_server else None


_OUTPUT = "output_tokens_per_s"
_STEP = "ms_per_step"
_SERVED = "serving_rate_16.0"

GOALS = (
    Goal("0.6B: 256 requests", _SMALL, "throughput", _OUTPUT, "output tokens/s", 18873, 1.2, 1.35, True, True),
    Goal("0.6B: batch 1", _SMALL, "decode_b1", _STEP, "ms a token", 2.11, 1.0, 0.6),
    Goal("8B: 256 requests", _LARGE, "throughput", _OUTPUT, "output tokens/s", 7672, 1.05, 1.15, True, True),
    Goal("8B: batch 1", _LARGE, "decode_b1", _STEP, "ms a token", 6.85, 5.9, 5.4),
    Goal("8B: 8,192-token prompt", _LARGE, "prefill_1x8192", "mfu_datasheet", "MFU", 0.62, 0.62, 0.66, True),
    Goal("30B-A3B: batch 1", _MIXTURE, "decode_b1", _STEP, "ms a step", 4.97, 3.5, 2.8),
    Goal("30B-A3B: batch 8", _MIXTURE, "decode_b8", _STEP, "ms a step", 11.75, 9.5, 9.0),
    Goal(
        "30B-A3B: 256 requests", _MIXTURE, "throughput", _OUTPUT, "output tokens/s", 3364, 1.2, 1.45, True, True
    ),
    Goal(
        "8B: shared prefix, 128 requests", _LARGE, "prefix_shared", "median_s", "s", 1.49, 1.0, 0.8, False, True
    ),
    Goal("8B: process start to first token, caches warm", _LARGE, "warm", START, "s", 34, 12, 6),
    Goal("8B: process start to first token, caches cold", _LARGE, "cold", START, "s", 99, 30, 15),
    Goal("8B: server at 16/s, TTFT p50", _LARGE, _SERVED, "ttft_ms.median", "ms", 45, 1.0, None, False, True),
    Goal("8B: server at 16/s, ITL p99", _LARGE, _SERVED, "itl_ms.p99", "ms", 39, 1.0, None, False, True),
)


def goals_table(own: Sequence[Result], peers: Sequence[Result]) -> str:
    """Every goal that we have a figure for, against the best of the peers' or, without one, what was seen earlier."""
    lines = [["workload", "unit", "vLLM 0.24", "ours", "ours / vLLM", "reach; then", ""]]
    for goal in GOALS:
        value, peer = goal.value(own), goal.best(peers, own)
        other = f"{shown(goal.seen)} (seen earlier)" if peer is None else shown(peer)
        peer = goal.seen if peer is None else peer
        cells = ["", ""] if value is None else [shown(value), f"{value / peer:.2f}"]
        verdict = "not measured" if value is None else goal.verdict(value, peer)
        lines.append([goal.what, goal.unit, other, *cells, goal.goals, verdict])
    return table(lines)
