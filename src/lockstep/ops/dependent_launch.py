"""Kernels that start while the one before them ends: programmatic dependent launch. Importing it imports Triton.

A kernel that is launched so may run before the results of those before it are there. Each keeps two rules. Until it
has waited it writes nothing and reads only what none of them can have written: weights, which are fixed when a model is
built, and tables of a step, which are there before its first kernel. And every one waits: then the end of a kernel is
the end of all before it, whether or not the next one is launched so.
Source: CUDA Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl


@triton.jit
def wait_for_inputs(PDL: tl.constexpr, NEXT_FIRST: tl.constexpr = False) -> None:
    """Returns when the results of the kernels before are there; lets the next kernel start its weights.

    NEXT_FIRST: lets it before it waits. That is for small kernels, beside which the next finds room; beside a large one
    it would only be in the way of what is to come before it.
    """
    if PDL:
        if NEXT_FIRST:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        else:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()


@cache
def dependent_launch() -> dict[str, bool]:
    """What a kernel with a constant PDL is launched with: early where the device and this Triton can, else as ever.

    NVIDIA devices of compute capability 9.0 and later can.
    """
    # Triton of other vendors may know neither.
    if hasattr(getattr(tl.extra, "cuda", None), "gdc_wait") and not triton.knobs.runtime.interpret:
        target = triton.runtime.driver.active.get_current_target()
        if target.backend == "cuda" and target.arch >= 90:
            return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
