"""Contract of decoder_forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from lockstep.ops.contract import Argument, Case, Contract, Tolerance
from lockstep.ops.decoder_forward.cases import KINDS, Decoder, step
from lockstep.ops.decoder_forward.outline import BlockOutline, DecoderOutline
from lockstep.ops.decoder_forward.reference import decoder_forward

_Batch = tuple[tuple[int, int], ...]

_MIXED: _Batch = ((1, 37), (1, 1), (9, 9), (5, 40))
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _cases() -> Iterator[Case]:
    for number, kind in enumerate(KINDS):
        yield _case(Decoder(kind), _MIXED, _DTYPES[number % 3])
        # Few rows, and so many that kernels work in other tiles.
        yield _case(Decoder(kind), ((1, 20),), torch.float32)
        yield _case(Decoder(kind), ((45, 60), (1, 5)), torch.float32)
    yield _case(Decoder(), (), torch.float32)
    yield _case(Decoder(window=12), _MIXED, torch.float32)
    yield _case(Decoder(has_bias=True), _MIXED, torch.bfloat16)
    yield _case(Decoder(has_head_norms=True, heads=6), _MIXED, torch.float32)
    yield _case(Decoder(has_outer_norms=True, activation="gelu_tanh", soft_cap=5.0), _MIXED, torch.float32)
    yield _case(Decoder(activation="gelu", heads=2, kv_heads=1, head_dim=64), _MIXED, torch.bfloat16)
    yield _case(Decoder(hidden_size=96, heads=3, kv_heads=3, page_size=1), _MIXED, torch.float32)
    # A context long enough to be shared out.
    yield _case(Decoder(num_blocks=1), ((1, 1100), (1, 513), (1, 3)), torch.float32)


def _case(decoder: Decoder, batch: _Batch, pool_dtype: torch.dtype) -> Case:
    def make(generator: torch.Generator) -> tuple[Any, ...]:
        return step(generator, decoder, batch, pool_dtype)

    return Case(f"{decoder}, {pool_dtype} {batch}", decoder.signature(pool_dtype), make)


def _with_blocks(change: Callable[[BlockOutline], BlockOutline]) -> Callable[..., torch.Tensor]:
    """The reference over a decoder whose blocks are changed."""

    def wrong(*given: Any) -> torch.Tensor:
        outline: DecoderOutline = given[6]
        changed = replace(outline, blocks=tuple(change(block) for block in outline.blocks))
        return decoder_forward(*_with_outline(given, changed))

    return wrong


def _with_outline(given: tuple[Any, ...], outline: DecoderOutline) -> list[Any]:
    return [*given[:6], outline, given[7]]


def _halved_positions(*given: Any) -> torch.Tensor:
    # A shift of all positions would not show: attention sees their differences.
    changed = [given[0], given[1] // 2, *given[2:]]
    return decoder_forward(*changed)


def _last_key_missing(*given: Any) -> torch.Tensor:
    rows = given[4].diff()
    changed = [*given[:5], torch.maximum(given[5] - 1, rows), *given[6:]]
    return decoder_forward(*changed)


def _one_block_short(*given: Any) -> torch.Tensor:
    outline = given[6]
    return decoder_forward(
        *_with_outline(given, replace(outline, blocks=(outline.blocks[0], *outline.blocks[:-1])))
    )


def _unscaled_embedding(*given: Any) -> torch.Tensor:
    return decoder_forward(*_with_outline(given, replace(given[6], embedding_scale=1.0)))


def _swapped_norms(block: BlockOutline) -> BlockOutline:
    return replace(block, input_norm=block.post_norm, post_norm=block.input_norm)


def _unscaled(block: BlockOutline) -> BlockOutline:
    return replace(block, attention=replace(block.attention, scale=1.0))


def _other_rope(block: BlockOutline) -> BlockOutline:
    return replace(block, attention=replace(block.attention, rope=1 - block.attention.rope))


# An activation that is rounded to 8 bits within a block of 32 is off by 1 / (127 sqrt(12)) of the block's largest
# value, which is 2 to 3 times its root mean square: 0.6 percent of the vector. Each of the four products of a block
# adds that much noise to a stream that it moves by about its own size. Two blocks: sqrt(8) * 0.006 = 0.017 of the last
# norm's outputs, which are near one (below 3 in size, their weights up to 1.7); six sigmas of that.
_NOISE = 6 * 0.017 * 1.7

CONTRACT = Contract(
    name="decoder_forward",
    summary="every block of a decoder: from token ids to hidden rows, keys and values stored on the way",
    arguments=(
        Argument("token_ids", ("token",), note="int64; rows of each sequence together"),
        Argument("positions", ("token",), note="int64"),
        Argument("slots", ("token",), note="int64; where keys and values go"),
        Argument("page_table", ("sequence", "page"), note="int32"),
        Argument("cu_rows", ("sequence + 1",), note="int32; the first row of each sequence"),
        Argument("num_keys", ("sequence",), note="int32; new tokens included"),
        Argument("outline", constant=True, opaque=True, note="the decoder: see outline.py"),
        Argument("kv", ("block", "keys and values", "kv_head", "page", "slot", "head_dim"), written=True),
    ),
    returns=("hidden[token, hidden]",),
    rounding=(
        "float32 hidden rows and sums; the inputs of products may be rounded to bfloat16, or to 8 bits by blocks of "
        "32 where weights are integers; keys and values are rounded to the pool's dtype"
    ),
    signature=("dtype", "pool_dtype", "head_dim", "inner_size", "num_ranks"),
    reference=decoder_forward,
    cases=_cases,
    tolerance={torch.float32: Tolerance(absolute=_NOISE, relative=0.02)},
    mutants={
        "positions halved": _halved_positions,
        "last key not seen": _last_key_missing,
        "first block instead of the last": _one_block_short,
        "embedding not scaled": _unscaled_embedding,
        "norms swapped": _with_blocks(_swapped_norms),
        "scores not scaled": _with_blocks(_unscaled),
        "the other rotation": _with_blocks(_other_rope),
    },
    parts=(
        "rms_norm",
        "add_rms_norm",
        "linear",
        "quant_linear",
        "rope",
        "kv_store",
        "attention_decode",
        "attention_extend",
        "silu_and_mul",
        "gelu_and_mul",
        "norm_rope_store",
        "norm_rope_attention_decode",
        "add_norm_linear",
    ),
)
