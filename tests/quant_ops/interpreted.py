"""Runs one operator's Triton kernel on the processor, in Triton's interpreter: `python interpreted.py OPERATOR SEED`.

Checks its contract on every SKIPth case and, for group quantisers, all their properties. Exits 1 on a failure.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import quant_properties as properties
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

from lockstep.ops.check import check_kernel
from lockstep.ops.registry import contracts, kernels

SKIP = {"per_token_group_quant_fp8": 2, "per_token_group_quant_int8": 2, "scaled_mm_fp8": 3}


def round_as_processors_do() -> None:
    """The interpreter's own roundings to narrow floats send halves away from zero, lose carries and cut off subnormal
    values; torch's take their place."""
    own = interpreter._convert_float
    narrow = {tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8), tl.bfloat16: (torch.bfloat16, torch.uint16)}

    def convert(values: np.ndarray, given: Any, wanted: Any, rounding: Any) -> np.ndarray:
        if given != tl.float32 or wanted not in narrow:
            return np.asarray(own(values, given, wanted, rounding))
        dtype, bits = narrow[wanted]
        floats = torch.from_numpy(np.ascontiguousarray(values).view(np.float32))
        return np.asarray(floats.to(dtype).view(bits).numpy())

    interpreter._convert_float = convert


def main(op: str, seed: int) -> int:
    torch.set_num_threads(1)
    round_as_processors_do()
    kernel = next(kernel for kernel in kernels(op) if kernel.provider == "triton")
    whole = contracts()[op]
    contract = replace(
        whole, cases=lambda: islice(whole.cases(), seed % SKIP.get(op, 1), None, SKIP.get(op, 1))
    )
    report = check_kernel(contract, kernel, seed=seed)
    print(
        f"{report.num_cases} cases, worst {report.worst_share:.2f} in {report.worst_case}",
        *report.failures,
        sep="\n",
    )
    if op.startswith("per_token_group"):
        properties.check_all(kernel.function, "cpu", seed)
    return 0 if report.passed and not report.refused else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
