"""Contract of kv_store."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lockstep.ops.cases import DTYPES, normal
from lockstep.ops.contract import Argument, Case, Contract, Tolerance, Workload
from lockstep.ops.kv_store.reference import kv_store

_Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

_SHAPES = (
    (1, 1, 32, 16),
    (40, 3, 32, 16),
    (9, 2, 80, 1),
    (0, 2, 32, 16),
    (7, 8, 128, 64),
    (2, 128, 64, 16),
)
"""Tokens, heads, head dim, page size."""


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for pool_dtype in DTYPES:
            for shape in _SHAPES:
                for padding in (0, 3):
                    yield _case(dtype, pool_dtype, shape, padding)
            # The large ones are beyond float16's range in part.
            for size in (0.0, 3e4):
                yield _case(dtype, pool_dtype, (5, 2, 32, 16), 0, size)


def _case(
    dtype: torch.dtype,
    pool_dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    padding: int,
    size: float = 1.0,
) -> Case:
    def make(g: torch.Generator) -> _Arguments:
        return _call(g, shape, padding, dtype, pool_dtype, size)

    tokens, heads, head_dim, page_size = shape
    what = f"{tokens}x{heads}x{head_dim}, page {page_size}, {padding} of padding"
    return Case(
        f"{dtype} into {pool_dtype}, {what}{f', size {size:g}' * (size != 1)}",
        {"dtype": dtype, "pool_dtype": pool_dtype, "page_size": page_size},
        make,
    )


def _call(
    g: torch.Generator,
    shape: tuple[int, int, int, int],
    padding: int,
    dtype: torch.dtype,
    pool_dtype: torch.dtype,
    size: float = 1.0,
) -> _Arguments:
    """Heads are slices of wider tensors, as rope and packed products leave them; padding lies among the tokens."""
    tokens, heads, head_dim, page_size = shape
    rows = tokens + padding
    rotated = normal(g, rows, 2 * heads, head_dim, dtype=pool_dtype, scale=size)
    packed = normal(g, rows, 2 * heads, head_dim, dtype=dtype, scale=size)
    num_pages = -(-2 * rows // page_size) + 1
    k_pool, v_pool = (normal(g, heads, num_pages, page_size, head_dim, dtype=pool_dtype) for _ in range(2))
    # Beside padding nobody has the first slot: who stores padding there must not be covered by the one that has it.
    unused = 1 if padding else 0
    slots = torch.randperm(num_pages * page_size - unused, generator=g)[:rows] + unused
    slots[torch.randperm(rows, generator=g)[:padding]] = -1
    return rotated[:, heads:], packed[:, heads:], k_pool, v_pool, slots


def _keys_and_values_swapped(
    k: torch.Tensor, v: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, slots: torch.Tensor
) -> None:
    kv_store(v, k, k_pool, v_pool, slots)


def _next_slot(
    k: torch.Tensor, v: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, slots: torch.Tensor
) -> None:
    num_slots = k_pool.shape[1] * k_pool.shape[2]
    kv_store(k, v, k_pool, v_pool, torch.where(slots < 0, slots, (slots + 1) % num_slots))


def _padding_written_from_the_end(
    k: torch.Tensor, v: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, slots: torch.Tensor
) -> None:
    kv_store(k, v, k_pool, v_pool, slots % (k_pool.shape[1] * k_pool.shape[2]))


def _padding_written_to_the_first_slot(
    k: torch.Tensor, v: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, slots: torch.Tensor
) -> None:
    kv_store(k, v, k_pool, v_pool, slots.clamp_min(0))


def _missing_last_head(
    k: torch.Tensor, v: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, slots: torch.Tensor
) -> None:
    kv_store(k[:, :-1], v[:, :-1], k_pool[:-1], v_pool[:-1], slots)


def _timed(tokens: int) -> Case:
    return _case(torch.bfloat16, torch.bfloat16, (tokens, 8, 128, 16), padding=0)


def _moved(
    k: torch.Tensor, v: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, slots: torch.Tensor
) -> int:
    """Rows are read from one tensor and written to the other; the rest of the pool stays where it is."""
    return 2 * (k.nbytes + v.nbytes) + slots.nbytes


CONTRACT = Contract(
    name="kv_store",
    summary="write new keys and values into their slots of the pool",
    arguments=(
        Argument("k", ("token", "kv_head", "head_dim"), note="in the pool's dtype, as rope leaves it"),
        Argument("v", ("token", "kv_head", "head_dim"), note="in the dtype of the products"),
        Argument("k_pool", ("kv_head", "page", "slot", "head_dim"), written=True),
        Argument("v_pool", ("kv_head", "page", "slot", "head_dim"), written=True),
        Argument("slots", ("token",), note="int64, all different; -1 for padding, which is written nowhere"),
    ),
    returns=(),
    rounding="to the pool's dtype",
    signature=("dtype", "pool_dtype", "page_size"),
    reference=kv_store,
    cases=_cases,
    tolerance=dict.fromkeys(DTYPES, Tolerance(0, 0)),
    mutants={
        "keys and values swapped": _keys_and_values_swapped,
        "one slot further": _next_slot,
        "padding counted from the end": _padding_written_from_the_end,
        "padding in the first slot": _padding_written_to_the_first_slot,
        "missing last head": _missing_last_head,
    },
    workload=Workload(
        "tokens of 8 heads of 128 bfloat16", (1, 16, 256, 2048, 8192, 32768), _timed, num_bytes=_moved
    ),
)
