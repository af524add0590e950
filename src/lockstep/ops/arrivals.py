"""Parts that programs of one launch write, and the last of them to arrive puts together. Importing it imports Triton.

A launch needs counters and memory for its parts to itself. Both are shared by launches of one stream, and that is safe
though kernels may be launched early (`dependent_launch`): each waits, before it writes anything, for the end of all
before it, so only one at a time is past its wait. Counters are zeros between launches, replayed ones too, since who
arrives last sets its counter back. Memory for parts is what an allocator gives out again in a stream's order.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

NUM_COUNTERS = 65536


@cache
def counters_of(device: torch.device) -> torch.Tensor:
    """[NUM_COUNTERS] int32 on the device, zeros between launches: how many parts of each whole were written."""
    return torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)


@triton.jit
def arrives_last(counter_ptr: tl.tensor, num_parts: tl.tensor) -> tl.tensor:
    """Whether this program is the last of `num_parts` that come here: then it may read what all of them stored.

    Parts are read past the cache of a multiprocessor (".cg"), which may hold what lay there before.
    """
    # Every thread's part is written before one of them says so.
    tl.debug_barrier()
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_parts - 1
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last
