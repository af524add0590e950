"""Runs the Triton kernels of attention on the processor, in Triton's interpreter: `python interpreted.py OP SEED`.

Checks every case of the contract that is small enough, then again with the other choice of
parts or tiles. Exits 1 on a failure.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "ops_basic"))

import torch
from triton_interpreter import as_processors_do

from lockstep.ops.attention_extend import tiles
from lockstep.ops.check import check_kernel
from lockstep.ops.contract import Case, Contract
from lockstep.ops.registry import contracts, kernels

WIDE = 64
"""Heads."""

MOST_PROGRAMS = 40
"""Programs times turns of the loop that are still quick to interpret."""


def small_cases(contract: Contract) -> Iterator[Case]:
    for case in contracts()[contract.name].cases():
        arguments = case.make(torch.Generator().manual_seed(0))
        if arguments[0].dtype == torch.float16:
            continue  # interpreted as float32 is
        if arguments[0].shape[1] >= WIDE and arguments[0].dtype == torch.float32:
            continue  # takes as long as all others together, and is tiled as in bfloat16
        q, pool, num_keys = arguments[0], arguments[1], arguments[4 if "decode" in contract.name else 5]
        turns = 1 + int(num_keys.sum()) // 32
        rounds = 1 if contract.name == "attention_decode" else 8
        if q.shape[0] * pool.shape[0] * turns <= MOST_PROGRAMS * rounds:
            yield case


def passes(contract: Contract, seed: int, what: str = "") -> bool:
    kernel = next(kernel for kernel in kernels(contract.name) if kernel.provider == "triton")
    report = check_kernel(contract, kernel, seed=seed)
    worst = f"worst {report.worst_share:.2f} in {report.worst_case}"
    print(f"{contract.name}{what}, seed {seed}: {report.num_cases} cases, {worst}")
    print(*report.failures[:5], *report.refused[:5], sep="\n")
    return report.passed and not report.refused


def main(op: str, seed: int) -> int:
    torch.set_num_threads(1)
    as_processors_do()
    contract = contracts()[op]
    # Each case in one of two ways: as it is launched, or as another number of programs would have it.
    good = passes(replace(contract, cases=lambda: islice(small_cases(contract), 0, None, 2)), seed)
    contract = replace(contract, cases=lambda: islice(small_cases(contract), 1, None, 2))
    if op.startswith("attention_decode"):
        tiles.ENOUGH_PROGRAMS = 1
        good &= passes(contract, seed, " in one part")
    else:
        tiles.ENOUGH_TILES = 0
        good &= passes(contract, seed, " in tiles for many rows")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
