"""Runs Triton kernels on the processor, in Triton's interpreter: `python interpreted.py SEED OPERATOR...`.

Checks every case of each operator's contract. Exits 1 on a failure, and where a kernel refuses a case.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

from lockstep.ops.check import check_kernel
from lockstep.ops.registry import contracts, kernels


def round_as_processors_do() -> None:
    """The interpreter cuts floats off where it makes them bfloat16; every processor rounds, as torch does."""
    own = interpreter._convert_float

    def convert(values: np.ndarray, given: Any, wanted: Any, rounding: Any) -> np.ndarray:
        if given != tl.float32 or wanted != tl.bfloat16:
            return np.asarray(own(values, given, wanted, rounding))
        floats = torch.from_numpy(np.ascontiguousarray(values).view(np.float32))
        return np.asarray(floats.to(torch.bfloat16).view(torch.uint16).numpy())

    interpreter._convert_float = convert


def main(seed: int, *ops: str) -> int:
    torch.set_num_threads(1)
    round_as_processors_do()
    passed = bool(ops)
    for op in ops:
        kernel = next(kernel for kernel in kernels(op) if kernel.provider == "triton")
        report = check_kernel(contracts()[op], kernel, seed=seed)
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
