"""Known-wrong versions of norm_rope_attention_decode, those of its parts among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lockstep.ops.attention_decode.contract import CONTRACT as DECODE
from lockstep.ops.attention_decode.reference import attention_decode
from lockstep.ops.norm_rope_attention_decode.reference import new_slots, norm_rope_attention_decode
from lockstep.ops.norm_rope_store.contract import CONTRACT as STORE
from lockstep.ops.norm_rope_store.reference import norm_rope_store

_Part = Callable[..., None]
_Given = dict[str, Any]

_NEW = ("heads", "q_weight", "k_weight", "eps", "cos", "sin")
_POOLS = ("k_pool", "v_pool")
_WHERE_AND_HOW = ("page_table", "num_keys", "sinks", "out", "scale", "window", "soft_cap")
_NAMES = (*_NEW, *_POOLS, *_WHERE_AND_HOW)

# As wrong as queries and keys that are rounded before they are multiplied, which is allowed here.
_ALLOWED = {"scores rounded to 16 bits", "scaled query rounded to 16 bits"}


def _in_parts(store: _Part, attend: _Part) -> _Part:
    """The two operators one after the other, either of them wrong."""

    def wrong(*given: Any) -> None:
        named = dict(zip(_NAMES, given, strict=True))
        attend(_stored(named, store), *(named[name] for name in (*_POOLS, *_WHERE_AND_HOW)))

    return wrong


def _stored(given: _Given, store: _Part) -> torch.Tensor:
    """The queries, once keys and values are in the pools."""
    slots = new_slots(given["page_table"], given["num_keys"], given["k_pool"].shape[2])
    q = torch.empty_like(given["out"])
    store(*(given[name] for name in (*_NEW, *_POOLS)), slots, q)
    return q


def _into_a_copy(pool: str) -> _Part:
    """What is new is attended, but stored in none of the pool's own slots."""

    def wrong(*given: Any) -> None:
        named = dict(zip(_NAMES, given, strict=True))
        norm_rope_attention_decode(*(named | {pool: named[pool].clone()}).values())

    return wrong


def _stored_after_attending(*given: Any) -> None:
    named = dict(zip(_NAMES, given, strict=True))
    before = [named[pool].clone() for pool in _POOLS]
    q = _stored(named, norm_rope_store)
    attention_decode(q, *before, *(named[name] for name in _WHERE_AND_HOW))


def _first_key_missed(q: torch.Tensor, *given: Any) -> None:
    """Each sequence has a window of its own, which ends before its first key."""
    k, v, table, num_keys, sinks, out, scale, window, cap = given
    for row, keys in enumerate(num_keys.tolist()):
        one = slice(row, row + 1)
        seen = min(window or keys, max(1, keys - 1))
        attention_decode(q[one], k, v, table[one], num_keys[one], sinks, out[one], scale, seen, cap)


def _last_page_of_another(q: torch.Tensor, *given: Any) -> None:
    """In the page of a sequence's last key are those of the sequence after it."""
    k, v, table, num_keys, *rest = given
    table, last = table.clone(), [(keys - 1) // k.shape[2] for keys in num_keys.tolist()]
    rows = [row for row, page in enumerate(last) if page >= 0]
    pages = [int(table[row, last[row]]) for row in rows]
    for row, page in zip(rows, pages[1:] + pages[:1], strict=True):
        table[row, last[row]] = page
    attention_decode(q, k, v, table, num_keys, *rest)


MUTANTS: dict[str, _Part] = {
    **{name: _in_parts(mutant, attention_decode) for name, mutant in STORE.mutants.items()},
    "new key not stored": _into_a_copy("k_pool"),
    "new value not stored": _into_a_copy("v_pool"),
    "stored after attending": _stored_after_attending,
    "first key missed": _in_parts(norm_rope_store, _first_key_missed),
    "last page of another row": _in_parts(norm_rope_store, _last_page_of_another),
    **{
        name: _in_parts(norm_rope_store, mutant)
        for name, mutant in DECODE.mutants.items()
        if name not in _ALLOWED
    },
}
