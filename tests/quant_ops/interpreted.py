"""Runs Triton kernels on the processor, in Triton's interpreter: `python interpreted.py SEED OPERATOR...`.

Checks every case of each contract, of operators with MANY each in one dtype, and all properties of group quantisers.
Exits 1 on a failure.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "ops_basic"))

import quant_properties as properties
import torch
from triton_interpreter import as_processors_do, dtypes_in_turn

from lockstep.ops.check import check_kernel
from lockstep.ops.registry import contracts, kernels

MANY = ("per_token_group_quant_fp8", "per_token_group_quant_int8", "scaled_mm_fp8")


def passes(op: str, seed: int) -> bool:
    kernel = next(kernel for kernel in kernels(op) if kernel.provider == "triton")
    contract = contracts()[op]
    if op in MANY:
        contract = replace(contract, cases=partial(iter, list(dtypes_in_turn(contract.cases()))))
    report = check_kernel(contract, kernel, seed=seed)
    worst = f"worst {report.worst_share:.2f} in {report.worst_case}"
    print(f"{op}, seed {seed}: {report.num_cases} cases, {worst}", *report.failures, *report.refused, sep="\n")
    if op.startswith("per_token_group"):
        properties.check_all(kernel.function, "cpu", seed)
    return report.passed and not report.refused


def main(seed: int, *ops: str) -> int:
    torch.set_num_threads(1)
    as_processors_do()
    return 0 if ops and all([passes(op, seed) for op in ops]) else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
