"""Contract of norm_rope_store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from lockstep.ops.cases import DTYPES, normal, strided
from lockstep.ops.contract import FLOAT32_UNIT, Argument, Case, Contract, Signature, Workload, rounded
from lockstep.ops.norm_rope_store.reference import norm_rope_store

_Arguments = tuple[Any, ...]

_SHAPES = (
    (1, 16, 8, 128, 16),
    (5, 6, 2, 64, 1),
    (9, 9, 3, 32, 16),
    (0, 4, 2, 32, 16),
    (3, 2, 1, 80, 4),
    (2, 3, 1, 256, 16),
    (2, 128, 8, 64, 16),
)
"""Tokens, query heads, KV heads, head dim, page size."""

_LARGEST = 8.0
"""Bounds what enters the rotation: heads are normal, weights of norms near one."""


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for shape in _SHAPES:
            for has_norms in (False, True):
                yield _case(f"{dtype} {shape}", shape, (dtype, dtype, dtype), has_norms, padding=0)
        some = _SHAPES[2]
        yield _case(f"{dtype} {some}, padding", some, (dtype, dtype, dtype), True, padding=3)
        for size in (0.0, 1e-3, 1e3):
            yield _case(
                f"{dtype} {some}, size {size:g}", some, (dtype, dtype, dtype), True, padding=0, size=size
            )
        if dtype != torch.float32:
            dtypes = (dtype, dtype, torch.float32)
            yield _case(f"{dtype} {some}, float32 weights", some, dtypes, True, padding=0)
            dtypes = (dtype, torch.float32, dtype)
            yield _case(f"{dtype} {some} into float32", some, dtypes, False, padding=1)


def _case(
    name: str,
    shape: tuple[int, int, int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    has_norms: bool,
    padding: int,
    size: float = 1.0,
) -> Case:
    def make(g: torch.Generator) -> _Arguments:
        return _call(g, shape, dtypes, has_norms, padding, size)

    return Case(f"{name}{', norms' if has_norms else ''}", _signature(shape, dtypes, has_norms), make)


def _signature(
    shape: tuple[int, int, int, int, int], dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], has_norms: bool
) -> Signature:
    _, heads, kv_heads, head_dim, page_size = shape
    return {
        "dtype": dtypes[0],
        "pool_dtype": dtypes[1],
        "weight_dtype": dtypes[2] if has_norms else None,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "page_size": page_size,
    }


def _call(
    g: torch.Generator,
    shape: tuple[int, int, int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    has_norms: bool,
    padding: int,
    size: float,
) -> _Arguments:
    """Padding lies among the tokens; what it is rotated to is a result like any other."""
    tokens, heads, kv_heads, head_dim, page_size = shape
    dtype, pool_dtype, weight_dtype = dtypes
    rows = tokens + padding
    packed = strided(normal(g, rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype, scale=size))
    weights = (normal(g, head_dim, dtype=weight_dtype, scale=0.1) + 1 if has_norms else None for _ in range(2))
    angles = torch.rand(rows, head_dim // 2, generator=g) * 100
    num_pages = -(-2 * rows // page_size) + 1
    pools = (normal(g, kv_heads, num_pages, page_size, head_dim, dtype=pool_dtype) for _ in range(2))
    # Beside padding nobody has the first slot: who stores padding there must not be covered by the one that has it.
    unused = 1 if padding else 0
    slots = torch.randperm(num_pages * page_size - unused, generator=g)[:rows] + unused
    slots[torch.randperm(rows, generator=g)[:padding]] = -1
    heads_TAH = packed.unflatten(1, (-1, head_dim))
    q_TNH = torch.empty(rows, heads, head_dim, dtype=pool_dtype)
    return heads_TAH, *weights, 1e-6, angles.cos(), angles.sin(), *pools, slots, q_TNH


def _with(**changes: Callable[..., Any]) -> Callable[..., None]:
    """The reference over arguments of which some are changed, each by a function of all."""

    def wrong(*given: Any) -> None:
        named = dict(zip(_NAMES, given, strict=True))
        norm_rope_store(*(changes[name](named) if name in changes else named[name] for name in _NAMES))

    return wrong


_NAMES = ("heads", "q_weight", "k_weight", "eps", "cos", "sin", "k_pool", "v_pool", "slots", "q")


def _keys_and_values_swapped(given: dict[str, Any]) -> torch.Tensor:
    heads, num_kv = given["heads"], given["k_pool"].shape[0]
    order = [*range(heads.shape[1] - 2 * num_kv), *range(-num_kv, 0), *range(-2 * num_kv, -num_kv)]
    changed: torch.Tensor = heads[:, order]
    return changed


def _next_slot(given: dict[str, Any]) -> torch.Tensor:
    slots, pool = given["slots"], given["k_pool"]
    return torch.where(slots < 0, slots, (slots + 1) % (pool.shape[1] * pool.shape[2]))


def _timed(tokens: int) -> Case:
    shape, dtypes = (tokens, 32, 8, 128, 16), (torch.bfloat16,) * 3
    return _case(f"{tokens} tokens", shape, dtypes, True, padding=0)


def _moved(heads: torch.Tensor, *given: Any) -> int:
    """Every new head is read once and written once; the rest of the pool stays where it is."""
    cos, sin, slots = given[3], given[4], given[7]
    return 2 * int(heads.nbytes) + int(cos.nbytes) + int(sin.nbytes) + int(slots.nbytes)


CONTRACT = Contract(
    name="norm_rope_store",
    summary="normalise and rotate new query and key heads; store keys and values into their slots of the pool",
    arguments=(
        Argument("heads", ("token", "query, key and value head", "head_dim")),
        Argument("q_weight", ("head_dim",), note="of the query heads' RMS norm; None for no norm"),
        Argument("k_weight", ("head_dim",), note="of the key heads' RMS norm; None for no norm"),
        Argument("eps"),
        Argument("cos", ("token", "head_dim / 2"), note="float32"),
        Argument("sin", ("token", "head_dim / 2"), note="float32"),
        Argument("k_pool", ("kv_head", "page", "slot", "head_dim"), written=True),
        Argument("v_pool", ("kv_head", "page", "slot", "head_dim"), written=True),
        Argument("slots", ("token",), note="int64, all different; -1 for padding, which is written nowhere"),
        Argument("q", ("token", "head", "head_dim"), written=True, note="contiguous, in the pool's dtype"),
    ),
    returns=(),
    rounding="float32 inside, to the pool's dtype at the end; norms may round to the dtype of the heads",
    signature=("dtype", "pool_dtype", "weight_dtype", "heads", "kv_heads", "head_dim", "page_size"),
    reference=norm_rope_store,
    cases=_cases,
    # The norm as rms_norm; each of the two elements that make a rotated one may have been rounded before, and each
    # product with cos or sin is.
    tolerance=rounded(1, maths=16, absolute=2 * 16 * _LARGEST * FLOAT32_UNIT, inside=2 * _LARGEST),
    mutants={
        "norms of queries and keys swapped": _with(
            q_weight=lambda given: given["k_weight"], k_weight=lambda given: given["q_weight"]
        ),
        "ten times eps": _with(eps=lambda given: 10 * given["eps"]),
        "rotated the other way": _with(sin=lambda given: -given["sin"]),
        "angles of the next token": _with(
            cos=lambda given: given["cos"].roll(-1, 0), sin=lambda given: given["sin"].roll(-1, 0)
        ),
        "keys and values swapped": _with(heads=_keys_and_values_swapped),
        "one slot further": _with(slots=_next_slot),
        "padding in the first slot": _with(slots=lambda given: given["slots"].clamp_min(0)),
    },
    workload=Workload(
        "tokens of 32 query and 8 KV heads of 128 bfloat16",
        (1, 16, 256, 2048, 8192),
        _timed,
        num_bytes=_moved,
    ),
    parts=("rms_norm", "rope", "kv_store"),
)
