"""Runs the Triton kernels of a decode step in Triton's interpreter: `python interpreted.py SEED OPERATOR...`.

Checks every case of each contract whose dtype the kernel takes and that is small enough. Exits 1 on a failure.
OPERATOR/SPLITS computes its products in blocks, each of so many parts, whatever the kernel would choose;
OPERATOR/gated those that are gated, in gated blocks.
"""

from __future__ import annotations

import importlib
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

from lockstep.ops.check import check_kernel
from lockstep.ops.contract import Case, Contract, Kernel
from lockstep.ops.linear import blocks, gated_blocks
from lockstep.ops.linear.tiles import Block, GatedBlock
from lockstep.ops.registry import contracts, kernels

MOST_PRODUCTS = 2**22
"""Products of numbers in a case that is still quick to interpret."""


def as_processors_do() -> None:
    """The interpreter cuts floats off where it makes them bfloat16, and multiplies bfloat16 as if bits were numbers."""
    own_convert, own_dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert(values: np.ndarray, given: Any, wanted: Any, rounding: Any) -> np.ndarray:
        if given != tl.float32 or wanted != tl.bfloat16:
            return np.asarray(own_convert(values, given, wanted, rounding))
        floats = torch.from_numpy(np.ascontiguousarray(values).view(np.float32))
        return np.asarray(floats.to(torch.bfloat16).view(torch.uint16).numpy())

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = torch.from_numpy(np.ascontiguousarray(handle.data).view(np.uint16).astype(np.int32) << 16)
        return interpreter.TensorHandle(bits.view(torch.float32).numpy(), tl.float32)

    def dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        return own_dot(builder, widened(a), widened(b), *rest)

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot


def quick_cases(contract: Contract, kernel: Kernel) -> Iterator[Case]:
    for case in contract.cases():
        given = case.make(torch.Generator().manual_seed(0))
        rows = next(len(value) for value in given if isinstance(value, torch.Tensor))
        num_products = rows * case.signature.get("inputs", 0) * case.signature.get("outputs", 0)
        if not num_products and case.signature["dtype"] == torch.float16:
            continue  # interpreted as float32 is
        if kernel.refuses(case.signature) is None and num_products <= MOST_PRODUCTS:
            yield case


def in_blocks(op: str, kind: str) -> Callable[[], int]:
    """Has the operator's products computed in blocks. Returns what counts them."""
    room: ModuleType
    block: Block | GatedBlock
    if kind == "gated":
        room, name = gated_blocks, "gated_product"
        block = GatedBlock(rows=16, outputs=16, inputs=64, group=2, programs=1, num_warps=4, num_stages=3)
    else:
        room, name = blocks, "block_product"
        block = Block(rows=16, outputs=32, inputs=64, splits=int(kind), ahead=64, num_warps=4, num_stages=3)
    own, counted = getattr(room, name), list[int]()

    def count(*given: Any, **options: Any) -> torch.Tensor:
        counted.append(1)
        return own(*given, **options)

    chooser: Any = importlib.import_module(f"lockstep.ops.{op}.kernels.triton")
    chooser.tile_of = lambda *problem: block if kind != "gated" or problem[0].gated else None
    setattr(room, name, count)
    return lambda: len(counted)


def main(seed: int, *named: str) -> int:
    torch.set_num_threads(1)
    as_processors_do()
    passed = bool(named)
    for op, slash, kind in (each.partition("/") for each in named):
        num_blocks = in_blocks(op, kind) if slash else None
        kernel = next(kernel for kernel in kernels(op) if kernel.provider == "triton")
        contract = contracts()[op]
        quick = partial(quick_cases, contract, kernel)
        report = check_kernel(replace(contract, cases=quick), kernel, seed=seed)
        worst = f"worst {report.worst_share:.2f} in {report.worst_case}"
        print(f"{op}, seed {seed}: {report.num_cases} cases, {worst}", *report.failures[:5], sep="\n")
        passed &= report.passed
        if num_blocks is not None:
            print(f"in blocks: {num_blocks()}")
            passed &= num_blocks() > 0
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
