"""Runs Triton kernels on the processor, in Triton's interpreter: `python interpreted.py SEED OPERATOR...`.

Checks every case of each operator's contract, of operators with MANY each in one dtype. Exits 1 on a failure, and where
a kernel refuses a case.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

import torch
from triton_interpreter import as_processors_do, dtypes_in_turn

from lockstep.ops.check import check_kernel
from lockstep.ops.registry import contracts, kernels

MANY = ("silu_and_mul", "gelu_and_mul", "rope", "kv_store")


def main(seed: int, *ops: str) -> int:
    torch.set_num_threads(1)
    as_processors_do()
    passed = bool(ops)
    for op in ops:
        kernel = next(kernel for kernel in kernels(op) if kernel.provider == "triton")
        contract = contracts()[op]
        if op in MANY:
            contract = replace(contract, cases=partial(iter, list(dtypes_in_turn(contract.cases()))))
        report = check_kernel(contract, kernel, seed=seed)
        worst = f"worst {report.worst_share:.2f} in {report.worst_case}"
        print(
            f"{op}, seed {seed}: {report.num_cases} cases, {worst}",
            *report.failures[:5],
            *report.refused[:5],
            sep="\n",
        )
        passed &= report.passed and not report.refused
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
