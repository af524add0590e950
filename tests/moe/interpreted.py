"""Checks the Triton kernels of an operator in Triton's interpreter; run as a script, one operator a process.

The interpreter computes products of bfloat16 on their bits, so operators with products run in the other dtypes.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import replace

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported by whoever needs it

import torch

from lockstep.ops.check import check_kernel
from lockstep.ops.contract import Case, Contract
from lockstep.ops.registry import contracts, kernels

SEED = 4
EVERY = {"moe_topk_softmax": 8, "moe_topk_sigmoid": 10, "moe_align": 2, "grouped_gemm": 2, "fused_moe": 2}
"""Which share of the cases runs; strides and dtypes are no multiples of these, so that each comes up."""


def chosen_cases(contract: Contract) -> Iterator[Case]:
    has_products = contract.name in ("grouped_gemm", "fused_moe")
    cases = [
        case for case in contract.cases() if not (has_products and case.signature["dtype"] == torch.bfloat16)
    ]
    yield from cases[:: EVERY[contract.name]]


def check(contract: Contract) -> None:
    triton = next(kernel for kernel in kernels(contract.name) if kernel.provider == "triton")
    report = check_kernel(contract, triton, seed=SEED)
    print(f"seed {SEED}: {report.num_cases} cases, worst {report.worst_share:.2f} in {report.worst_case}")
    assert report.passed, report.failures or "no case ran"


def check_lanes(contract: Contract) -> None:
    """The widths that only tens of thousands of tokens would choose."""
    programs = importlib.import_module(f"lockstep.ops.{contract.name}.programs")
    from lockstep.ops.moe_topk_softmax.tiles import tile_with

    cases = list(contract.cases())[1::14]
    for lanes in (2, 4):
        programs.tile_of = lambda num_tokens, lanes=lanes: tile_with(lanes, 1)
        check(replace(contract, cases=lambda: iter(cases)))


def main(name: str) -> None:
    torch.set_num_threads(1)
    contract = contracts()[name]
    check(replace(contract, cases=lambda: chosen_cases(contract)))
    if name.startswith("moe_topk"):
        check_lanes(contract)


if __name__ == "__main__":
    main(sys.argv[1])
