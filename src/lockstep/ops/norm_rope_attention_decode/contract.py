"""Contract of norm_rope_attention_decode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lockstep.ops.attention_decode.contract import CONTRACT as DECODE
from lockstep.ops.contract import FLOAT32_UNIT, Argument, Contract, Workload, rounded
from lockstep.ops.norm_rope_attention_decode.cases import cases, timed
from lockstep.ops.norm_rope_attention_decode.mutants import MUTANTS
from lockstep.ops.norm_rope_attention_decode.reference import norm_rope_attention_decode
from lockstep.ops.norm_rope_store.contract import CONTRACT as STORE

_OF_PARTS = {argument.name: argument for argument in (*DECODE.arguments, *STORE.arguments)}


def _of_part(name: str, *axes: str, note: str = "") -> Argument:
    """An argument as a part has it; with axes or a note of its own where they are given."""
    known = _OF_PARTS[name]
    return replace(known, axes=axes or known.axes, note=note or known.note)


def _moved(heads: torch.Tensor, *given: Any) -> int:
    """New heads, results, and the keys and values of every sequence; pages that nobody owns stay unread."""
    k_pool, v_pool, num_keys, out = given[5], given[6], given[8], given[10]
    num_slots = k_pool.shape[1] * k_pool.shape[2]
    return heads.nbytes + out.nbytes + (k_pool.nbytes + v_pool.nbytes) * int(num_keys.sum()) // num_slots


CONTRACT = Contract(
    name="norm_rope_attention_decode",
    summary="normalise and rotate the heads of each sequence's one new token, store its key and value, and attend",
    arguments=(
        _of_part("heads", "sequence", "query, key and value head", "head_dim"),
        _of_part("q_weight"),
        _of_part("k_weight"),
        _of_part("eps"),
        _of_part("cos", "sequence", "head_dim / 2"),
        _of_part("sin", "sequence", "head_dim / 2"),
        _of_part(
            "k_pool", note="any strides but the last; finite; keys but the new ones are there before the step"
        ),
        _of_part("v_pool", note="any strides but the last; finite; values but the new ones, too"),
        _of_part(
            "page_table",
            note="int32, there before the step; not followed after a sequence's last key; no other row's pages hold "
            "the slot of that one",
        ),
        _of_part(
            "num_keys",
            note="int32, there before the step; the new token included, whose slot is the last; 0 for padding",
        ),
        _of_part("sinks"),
        _of_part("out", note="contiguous, in the pool's dtype; padding becomes zeros"),
        _of_part("scale"),
        _of_part("window"),
        _of_part("soft_cap"),
    ),
    returns=(),
    rounding="as the parts: rotated queries and keys may be rounded to the pool's dtype before they are multiplied",
    signature=(*DECODE.signature, "weight_dtype"),
    reference=norm_rope_attention_decode,
    cases=cases,
    # What is stored is as exact as norm_rope_store makes it.
    tolerance=STORE.tolerance,
    # Beside attention_decode's own errors, those of a score. In float32 the norms of a query and of the new key may
    # move it by 16 units each of a score below 6. Rounding moves an element of a rotated query by 0.4 units of its
    # size, and by another 0.4 where its norm rounds: a score, which sums H of them, moves by 1.2 * 0.4 * sqrt(2) = 0.7
    # units of the dtype, one deviation. What comes out moves most, by 2 units, where two keys with opposite values as
    # large as 4 share the weight; 8 are four deviations of that.
    tolerance_of={
        "out": rounded(1, maths=4, absolute=2 * (34 + 2 * 16 * 6) * 4 * FLOAT32_UNIT, inside=4.0 + 8.0)
    },
    mutants=MUTANTS,
    workload=Workload(
        "sequences of 1,024 keys, 32 heads over 8 of 128, bfloat16",
        (1, 8, 32, 128),
        timed,
        num_bytes=_moved,
    ),
    parts=("norm_rope_store", "attention_decode"),
)
