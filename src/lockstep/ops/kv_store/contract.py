"""Contract of kv_store."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lockstep.ops.cases import DTYPES, normal
from lockstep.ops.contract import Argument, Case, Contract, Tolerance
from lockstep.ops.kv_store.reference import kv_store

_Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for pool_dtype in DTYPES:
            for tokens, heads, page_size in ((1, 1, 16), (40, 3, 16), (9, 2, 1), (0, 2, 16)):

                def make(
                    g: torch.Generator,
                    sizes: tuple[int, int, int] = (tokens, heads, page_size),
                    dtypes: tuple[torch.dtype, torch.dtype] = (dtype, pool_dtype),
                ) -> _Arguments:
                    tokens, heads, page_size = sizes
                    rotated = normal(g, tokens, 2 * heads, 32, dtype=dtypes[1])
                    packed = normal(g, tokens, 2 * heads, 32, dtype=dtypes[0])
                    k_pool, v_pool = (normal(g, heads, 64, page_size, 32, dtype=dtypes[1]) for _ in range(2))
                    slots = torch.randperm(64 * page_size, generator=g)[:tokens]
                    return rotated[:, heads:], packed[:, heads:], k_pool, v_pool, slots

                yield Case(
                    f"{dtype} into {pool_dtype}, {tokens} tokens, {heads} heads, page {page_size}",
                    {"dtype": dtype, "pool_dtype": pool_dtype, "page_size": page_size},
                    make,
                )


def _keys_and_values_swapped(
    k: torch.Tensor, v: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, slots: torch.Tensor
) -> None:
    kv_store(v, k, k_pool, v_pool, slots)


def _next_slot(
    k: torch.Tensor, v: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, slots: torch.Tensor
) -> None:
    kv_store(k, v, k_pool, v_pool, (slots + 1) % (k_pool.shape[1] * k_pool.shape[2]))


CONTRACT = Contract(
    name="kv_store",
    summary="write new keys and values into their slots of the pool",
    arguments=(
        Argument("k", ("token", "kv_head", "head_dim"), note="in the pool's dtype, as rope leaves it"),
        Argument("v", ("token", "kv_head", "head_dim"), note="in the dtype of the products"),
        Argument("k_pool", ("kv_head", "page", "slot", "head_dim"), written=True),
        Argument("v_pool", ("kv_head", "page", "slot", "head_dim"), written=True),
        Argument("slots", ("token",), note="int64, all different"),
    ),
    returns=(),
    rounding="to the pool's dtype",
    signature=("dtype", "pool_dtype", "page_size"),
    reference=kv_store,
    cases=_cases,
    tolerance=dict.fromkeys(DTYPES, Tolerance(0, 0)),
    mutants={"keys and values swapped": _keys_and_values_swapped, "one slot further": _next_slot},
)
