"""Runs the Triton kernels of a decode step in Triton's interpreter: `python interpreted.py SEED OPERATOR...`.

Checks every case of each contract that the kernel takes and that is small enough, in one dtype. Exits 1 on a failure.
OPERATOR/SPLITS computes its products in blocks, each of so many parts, whatever the kernel would choose;
OPERATOR/gated those that are gated, in gated blocks.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

sys.path.append(str(Path(__file__).parents[1] / "ops_basic"))

import torch
from triton_interpreter import as_processors_do, dtypes_in_turn

from lockstep.ops.check import check_kernel
from lockstep.ops.contract import Case, Contract, Kernel
from lockstep.ops.linear import blocks, gated_blocks
from lockstep.ops.linear.tiles import Block, GatedBlock
from lockstep.ops.registry import contracts, kernels

MOST_PRODUCTS = 2**21
"""Products of numbers in a case that is still quick to interpret."""


def quick_cases(contract: Contract, kernel: Kernel) -> Iterator[Case]:
    for case in contract.cases():
        given = case.make(torch.Generator().manual_seed(0))
        rows = next(len(value) for value in given if isinstance(value, torch.Tensor))
        num_products = rows * case.signature.get("inputs", 0) * case.signature.get("outputs", 0)
        if kernel.refuses(case.signature) is None and num_products <= MOST_PRODUCTS:
            yield case


@contextmanager
def in_blocks(op: str, kind: str) -> Iterator[None]:
    """Has the operator's products computed in blocks. Raises AssertionError where none was."""
    room: ModuleType
    block: Block | GatedBlock
    if kind == "gated":
        room, name = gated_blocks, "gated_product"
        block = GatedBlock(rows=16, outputs=16, inputs=64, group=2, programs=1, num_warps=4, num_stages=3)
    else:
        room, name = blocks, "block_product"
        block = Block(rows=16, outputs=32, inputs=64, splits=int(kind), ahead=64, num_warps=4, num_stages=3)
    chooser = importlib.import_module(f"lockstep.ops.{op}.kernels.triton")

    def tile_of(*problem: Any) -> Block | GatedBlock | None:
        return block if kind != "gated" or problem[0].gated else None

    with (
        patch.object(chooser, "tile_of", tile_of),
        patch.object(room, name, wraps=getattr(room, name)) as product,
    ):
        yield
    assert product.called, f"{op} computed nothing in blocks"


def passes(op: str, seed: int) -> bool:
    kernel = next(kernel for kernel in kernels(op) if kernel.provider == "triton")
    contract = contracts()[op]
    cases = list(dtypes_in_turn(quick_cases(contract, kernel)))
    report = check_kernel(replace(contract, cases=partial(iter, cases)), kernel, seed=seed)
    worst = f"worst {report.worst_share:.2f} in {report.worst_case}"
    print(f"{op}, seed {seed}: {report.num_cases} cases, {worst}", *report.failures[:5], sep="\n")
    return report.passed


def main(seed: int, *named: str) -> int:
    torch.set_num_threads(1)
    as_processors_do()
    passed = bool(named)
    for op, _, kind in (each.partition("/") for each in named):
        with in_blocks(op, kind) if kind else nullcontext():
            passed &= passes(op, seed)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
