"""`lockstep bench tune-moe`: which plan computes a model's experts fastest on the card at hand.

For each number of tokens every way is tried, first with the tiles of its first product, then of its second; each is
compared with the reference before it is timed. The best ones are written where the kernel looks for them.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any

import torch

from lockstep.bench.fingerprint import fingerprint
from lockstep.bench.ops_timing import time_calls
from lockstep.bench.report import Report, shown
from lockstep.config import Given, gather, wanted
from lockstep.core.errors import ConfigError, KernelError
from lockstep.engine.model_files import DUMMY, open_files
from lockstep.models.llm.qwen3_moe import ExpertsConfig
from lockstep.ops.check import error_share
from lockstep.ops.fused_moe.contract import CONTRACT
from lockstep.ops.fused_moe.plans import (
    MOST_TOKENS_AS_ROWS,
    Measured,
    Plan,
    Problem,
    Way,
    as_json,
    measured_file,
    read_table,
    rows_for,
)
from lockstep.ops.fused_moe.reference import fused_moe
from lockstep.ops.grouped_gemm.tiles import DeviceFacts, Tile, facts_of, rows_of, step_bytes
from lockstep.ops.registry import kernels
from lockstep.ops.selection import unmet_need
from lockstep.platforms.base import Platform
from lockstep.platforms.registry import pick_platform

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_MOST_TOKENS_IN_PAIRS = 16
_ACCEPTED = 2.0
"""The reference and a kernel may both be one tolerance away from exact maths, to either side."""
_NUM_ROUTINGS = 16
_REPEATS_S = 0.005


def main(options: Mapping[str, Given], *, tokens: Sequence[int], seed: int, json_out: Path | None) -> int:
    """Measures, prints, writes the table of this card and returns the exit code.

    Raises ConfigError for a model without experts, KernelError for a device that the kernel is not for.
    """
    given = gather(options)
    files = open_files(wanted(given, "model"), wanted(given, "revision"), DUMMY)
    platform = pick_platform(wanted(given, "device"))
    _require_kernel(platform)
    dtype = getattr(torch, str(files.config.get("torch_dtype") or files.config.get("dtype") or "bfloat16"))
    sizes = experts_of(files.config, tp=wanted(given, "tp"), ep=wanted(given, "ep"), name=files.name)
    problems = [sizes._replace(num_tokens=count, itemsize=dtype.itemsize) for count in sorted(set(tokens))]
    machine = fingerprint()
    sweep = Sweep(platform, dtype, seed=seed)
    with torch.inference_mode():
        compile_ahead(problems, dtype, platform.device())
        for problem in problems:
            sweep.run(problem)
    cache_dir = Path(wanted(given, "cache_dir")).expanduser()
    file = measured_file(cache_dir, facts_of(platform.device()).name)
    write_table(file, sweep.table())
    Report(
        benchmark="tune-moe",
        machine=machine,
        model={"name": files.name, "dtype": str(dtype).removeprefix("torch.")},
        workload={key: getattr(sizes, key) for key in ("num_experts", "top_k", "width", "inner")},
        columns=["tokens", "way", "into the inner size", "out of it", "microseconds"],
        rows=[_row(measured, seconds) for measured, seconds in sweep.best],
        results={"best": sweep.table(), "tried": sweep.tried, "wrong": sweep.wrong},
        notes=[f"written to {file}", *(f"WRONG, not timed: {text}" for text in sweep.wrong)],
    ).publish(json_out)
    return 0 if len(sweep.best) == len(problems) else 1


def experts_of(config: Mapping[str, Any], *, tp: int, ep: int, name: str) -> Problem:
    """The experts of a config.json on the first rank, for no number of tokens yet.

    Raises ConfigError for a model without experts.
    """
    if not (config.get("num_experts") or config.get("num_local_experts")):
        raise ConfigError(f"{name} has no experts to tune for; name a mixture-of-experts model")
    experts = ExpertsConfig.parse(config)
    return Problem(
        0, experts.num_experts // ep, experts.top_k, config["hidden_size"], experts.inner_size // tp, 0
    )


def _require_kernel(platform: Platform) -> None:
    kernel = next(kernel for kernel in kernels(CONTRACT.name) if kernel.provider == "triton")
    reason = unmet_need(kernel, platform.capabilities())
    if reason is not None:
        raise KernelError(
            f"there is nothing to tune on {platform.name}: {CONTRACT.name}.{kernel.provider} is {reason}"
        )


def write_table(file: Path, new: Sequence[Mapping[str, Any]]) -> None:
    """Adds entries to a card's table, in the place of those for the same problems. Raises ConfigError if it cannot."""
    problems = [entry["problem"] for entry in new]
    kept = [entry for entry in _entries(file) if entry["problem"] not in problems]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([*kept, *new], indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror or error}; say --cache-dir") from None


def _entries(file: Path) -> list[dict[str, Any]]:
    read_table(file)  # says what is wrong with the file
    return json.loads(file.read_text()) if file.exists() else []


def candidates(problem: Problem, device: DeviceFacts) -> Iterator[tuple[Way, list[Tile], list[Tile]]]:
    """Each way that can compute the problem, with the tiles to try for its first product and for its second."""
    if problem.num_tokens <= _MOST_TOKENS_IN_PAIRS:
        yield "pairs", list(_pair_tiles(problem.width)), list(_pair_tiles(problem.inner))
    if problem.num_tokens <= MOST_TOKENS_AS_ROWS:
        tiles = list(_block_tiles(rows_for(problem.num_tokens), problem.itemsize, device.shared_bytes))
        yield "tokens", tiles, tiles
    if problem.num_tokens > _MOST_TOKENS_IN_PAIRS:
        even = rows_of(problem.num_pairs, problem.num_experts)
        for rows in sorted({max(16, even // 2), even, min(128, even * 2)}):
            tiles = list(_block_tiles(rows, problem.itemsize, device.shared_bytes))
            yield "grouped", tiles, tiles


def _pair_tiles(inputs: int) -> Iterator[Tile]:
    """Tiles of vectors: wide enough for whole lines of memory, small enough for registers."""
    longest = 1 << (inputs - 1).bit_length()
    for outputs, length, num_warps, num_stages in product(
        (2, 4, 8, 16), (256, 512, 1024, 2048), (4, 8), (0, 1, 3)
    ):
        values = outputs * min(length, longest) // (num_warps * 32)
        is_usual = num_stages == 1 or (num_warps == 4 and outputs in (4, 8))
        if length <= longest and 8 <= values <= 64 and is_usual:
            yield Tile(1, outputs, length, num_warps, num_stages)


def _block_tiles(rows: int, itemsize: int, shared_bytes: int) -> Iterator[Tile]:
    """Tiles for matrix units that fit on chip: many small ones for few rows, few large ones for many."""
    widths = (16, 32, 64, 128) if rows <= 32 else (64, 128, 256)
    # Reading weights wants several programs at a time on a processor, products want one with all its memory.
    most_bytes = shared_bytes // 2 if rows <= 32 else shared_bytes
    for outputs, inputs, num_warps, num_stages in product(widths, (64, 128, 256), (4, 8), (2, 3, 4)):
        tile = Tile(rows, outputs, inputs, num_warps, num_stages)
        on_the_way = step_bytes(tile, itemsize) * num_stages
        is_large = rows * outputs >= 64 * 128
        if 32 * 1024 <= on_the_way <= most_bytes and is_large == (num_warps == 8):
            yield tile


@dataclass
class Sweep:
    """Tries plans on one card. `best` holds the fastest plan of each problem with its seconds, `tried` all of them.

    `wrong` names plans that gave wrong results or could not run.
    """

    platform: Platform
    dtype: torch.dtype
    seed: int = 0
    best: list[tuple[Measured, float]] = field(default_factory=list)
    tried: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    _weights: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def run(self, problem: Problem, routing: Callable[[Problem, int], torch.Tensor] | None = None) -> None:
        """Tries every way; for each the first product's tiles beside one of the second's, then those beside the best.

        `routing` gives the ids [T, K] of a problem by a number; even routing when left out.
        """
        trial = _Trial(problem, self, routing or self._even)
        fastest: tuple[float, Plan] | None = None
        for way, ups, downs in candidates(problem, facts_of(self.platform.device())):
            up, down = ups[len(ups) // 2], downs[len(downs) // 2]
            for first in (True, False):
                plans = [
                    Plan(way, each, down) if first else Plan(way, up, each)
                    for each in (ups if first else downs)
                ]
                timed = [(seconds, plan) for plan in plans if (seconds := trial.time(plan)) is not None]
                if not timed:
                    break
                seconds, plan = min(timed)
                up, down = plan.up, plan.down
                fastest = min(fastest, (seconds, plan)) if fastest is not None else (seconds, plan)
        if fastest is not None:
            self.best.append((Measured(problem, fastest[1]), fastest[0]))

    def table(self) -> list[dict[str, Any]]:
        """The best plans as entries of a card's table."""
        return as_json((measured, seconds * 1e6) for measured, seconds in self.best)

    def weights(self, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate and up, and down, of all experts; made once."""
        num_experts, _, width, inner, _ = problem[1:]
        if (shape := problem[1:]) not in self._weights:
            generator = torch.Generator(device=self.platform.device()).manual_seed(self.seed)
            options: dict[str, Any] = {
                "generator": generator,
                "dtype": self.dtype,
                "device": self.platform.device(),
            }
            self._weights[shape] = (
                torch.randn(num_experts, 2 * inner, width, **options).mul_(width**-0.5),
                torch.randn(num_experts, width, inner, **options).mul_(inner**-0.5),
            )
        return self._weights[shape]

    def _even(self, problem: Problem, number: int) -> torch.Tensor:
        """Experts of each token, all equally likely."""
        generator = torch.Generator().manual_seed(self.seed + number)
        scores = torch.rand(problem.num_tokens, problem.num_experts, generator=generator)
        return scores.argsort(-1)[:, : problem.top_k].to(torch.int32)


class _Trial:
    """The calls of one problem: the same weights, routed in several ways so that a cache does not serve them."""

    def __init__(self, problem: Problem, sweep: Sweep, routing: Callable[[Problem, int], torch.Tensor]) -> None:
        self._sweep = sweep
        self._problem = problem
        device = sweep.platform.device()
        generator = torch.Generator().manual_seed(sweep.seed)
        rows = torch.randn(problem.num_tokens, problem.width, generator=generator)
        self._hidden = rows.to(sweep.dtype).to(device)
        self._shares = torch.rand(problem.num_tokens, problem.top_k, generator=generator).to(device)
        self._ids = [routing(problem, number).to(device) for number in range(_NUM_ROUTINGS)]
        self._expected = fused_moe(self._hidden, *sweep.weights(problem), self._shares, self._ids[0])
        gate_up, down = sweep.weights(problem)
        hit = sum(len(ids.unique()) for ids in self._ids) / len(self._ids)
        self.num_bytes = int(hit * (gate_up[0].nbytes + down[0].nbytes)) + 2 * self._hidden.nbytes

    def time(self, plan: Plan) -> float | None:
        """Seconds of a call; None, with a line in the sweep's list, for a plan that is wrong or cannot run."""
        from lockstep.ops.fused_moe.programs import mix_as_planned

        gate_up, down = self._sweep.weights(self._problem)

        def call(ids: torch.Tensor) -> torch.Tensor:
            return mix_as_planned(plan, self._hidden, gate_up, down, self._shares, ids)

        try:
            share = error_share(call(self._ids[0]), self._expected, CONTRACT.tolerance[self._sweep.dtype])
            if share > _ACCEPTED:
                self._sweep.wrong.append(
                    f"{self._problem.num_tokens} tokens, {plan}: off by {share:.3g} tolerances"
                )
                return None
            routings = cycle(self._ids)
            timing = time_calls(
                self._sweep.platform,
                lambda: partial(call, next(routings)),
                self.num_bytes,
                repeats_s=_REPEATS_S,
            )
        except Exception as error:  # A tile that does not fit a card is no reason to end the sweep.
            text = str(error).strip().partition("\n")[0]
            self._sweep.wrong.append(
                f"{self._problem.num_tokens} tokens, {plan}: {type(error).__name__}: {text}"
            )
            return None
        seconds = timing.seconds.median
        self._sweep.tried.append(
            {
                **as_json([(Measured(self._problem, plan), seconds * 1e6)])[0],
                "bytes_per_s": self.num_bytes / seconds,
            }
        )
        return seconds


def compile_ahead(
    problems: Iterable[Problem], dtype: torch.dtype, device: torch.device, num_processes: int | None = None
) -> None:
    """Compiles every candidate in several processes; the results lie in Triton's cache on disk.

    Each is launched once, on weights of one expert that stand for all: a program does not see the difference.
    """
    facts = facts_of(device)
    # Numbers of pairs reach a program as divisible by 16 or not; beyond that only the plan counts.
    distinct = {
        (plan, problem.num_pairs % 16): (problem, plan)
        for problem in problems
        for problem, plan in _plans_of(problem, facts)
    }
    plans = list(distinct.values())
    context = multiprocessing.get_context("spawn")
    workers = num_processes or min(16, context.cpu_count())
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        shares = [plans[number::workers] for number in range(workers)]
        list(pool.map(_compile, shares, [dtype] * workers, [device] * workers))


def _plans_of(problem: Problem, facts: DeviceFacts) -> Iterator[tuple[Problem, Plan]]:
    """Plans that between them have every tile of a problem's candidates in either place."""
    for way, ups, downs in candidates(problem, facts):
        for number in range(max(len(ups), len(downs))):
            yield problem, Plan(way, ups[number % len(ups)], downs[number % len(downs)])


def _compile(plans: Sequence[tuple[Problem, Plan]], dtype: torch.dtype, device: torch.device) -> None:
    from lockstep.ops.fused_moe.programs import mix_as_planned

    for problem, plan in plans:
        tokens, experts, top_k, width, inner, _ = problem
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        gate_up = torch.zeros(1, 2 * inner, width, **options).expand(experts, -1, -1)
        down = torch.zeros(1, width, inner, **options).expand(experts, -1, -1)
        ids = torch.arange(top_k, dtype=torch.int32, device=device).repeat(tokens, 1)
        try:
            mix_as_planned(
                plan,
                torch.zeros(tokens, width, **options),
                gate_up,
                down,
                torch.ones(tokens, top_k, device=device),
                ids,
            )
        except Exception:  # The sweep meets it again, and says so.
            continue


def _row(measured: Measured, seconds: float) -> list[str]:
    def words(tile: Tile) -> str:
        return f"{tile.rows} x {tile.outputs} x {tile.inputs}, {tile.num_warps} warps, {tile.num_stages} stages"

    plan = measured.plan
    return [
        f"{measured.problem.num_tokens}",
        plan.way,
        words(plan.up),
        words(plan.down),
        shown(seconds * 1e6),
    ]
