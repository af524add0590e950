"""Contract of decoder_decode."""

from __future__ import annotations

from lockstep.ops.contract import FLOAT32_UNIT, Argument, Contract, rounded
from lockstep.ops.decoder_decode.cases import cases
from lockstep.ops.decoder_decode.mutants import MUTANTS
from lockstep.ops.decoder_decode.reference import decoder_decode
from lockstep.ops.decoder_forward.contract import CONTRACT as FORWARD

# Between the products of a block about a dozen values are rounded: the stream twice, what the norms give, queries and
# keys before and after their rotation, weights of keys, what attention gives, gate, up, their product, what the two
# products give that are added to the stream. Each is off by 0.4 units of its own size, one deviation, and what it feeds
# moves the stream by about the stream's size. Three blocks: sqrt(3 * 12) * 0.4 = 2.4 units of the last norm's outputs,
# which are near one, their weights up to 1.7; six deviations of that. Larger outputs are off by their own rounding, and
# by the one before their weight.
_INSIDE = 6 * 2.4 * 1.7
# A sum of I products that ends near one walks 0.4 * sqrt(I / 2) units of float32, one deviation, and a block has four;
# the same six deviations. The widest of the float32 cases; beside the units of 16-bit numbers no width matters.
_LONGEST = 192
_SUMS = 6 * 1.7 * (3 * 4) ** 0.5 * 0.4 * (_LONGEST / 2) ** 0.5

CONTRACT = Contract(
    name="decoder_decode",
    summary="every block of a decoder for one new token of each of a few sequences, whose key and value are stored",
    arguments=(
        Argument("embedded", ("sequence", "hidden"), note="the residual stream before the first block"),
        Argument("cos", ("sequence", "head_dim / 2"), note="float32; of each row's position"),
        Argument("sin", ("sequence", "head_dim / 2"), note="float32"),
        Argument(
            "page_table",
            ("sequence", "page"),
            note="int32; not followed after a sequence's last key; no other row's pages hold the slot of that one",
        ),
        Argument(
            "num_keys",
            ("sequence",),
            note="int32; the new token included, whose slot is the last; 0 for padding",
        ),
        Argument(
            "outline",
            constant=True,
            opaque=True,
            note="the decoder: see decoder_forward; its embedding, ropes and head are not used",
        ),
        Argument(
            "kv",
            ("block", "keys and values", "kv_head", "page", "slot", "head_dim"),
            written=True,
            note="finite; keys and values but the new ones are there before the step",
        ),
    ),
    returns=("hidden[sequence, hidden]",),
    rounding=(
        "float32 sums; the residual stream, and all that lies between products, may be rounded to the dtype of "
        "embedded; keys and values are rounded to the pool's"
    ),
    signature=(
        "dtype",
        "pool_dtype",
        "hidden_size",
        "inner_size",
        "heads",
        "kv_heads",
        "head_dim",
        "page_size",
        "blocks",
        "activation",
        "plain",
        "head_norms",
        "qkv_bias",
        "num_ranks",
    ),
    reference=decoder_decode,
    cases=cases,
    tolerance=rounded(2, maths=4, absolute=_SUMS * FLOAT32_UNIT, inside=_INSIDE),
    # A new key carries the errors of the stream in front of its block, and is itself rounded after its product, its
    # norm, its rotation and as it is stored.
    tolerance_of={"kv": rounded(4, maths=4, absolute=_SUMS * FLOAT32_UNIT, inside=_INSIDE)},
    mutants=MUTANTS,
    parts=FORWARD.parts,
)
