"""What kernels are told of a decoder, with and without values, and which decoders are plain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lockstep.ops.decoder_decode.cases import Decoder, outline
from lockstep.ops.decoder_decode.contract import CONTRACT
from lockstep.ops.decoder_decode.signature import signature_of
from lockstep.ops.decoder_forward.cases import matrix
from lockstep.ops.decoder_forward.outline import BlockOutline, DecoderOutline, NormOutline
from lockstep.ops.nested import with_tensors

pytestmark = pytest.mark.suite("cpu")

GENERATOR = torch.Generator().manual_seed(7)
SMALL = Decoder(32, 2, 1, 16, 48, has_bias=True, has_head_norms=True)


def is_plain(decoder: DecoderOutline) -> bool:
    plain: bool = signature_of(decoder, torch.bfloat16, torch.bfloat16, 16, 1)["plain"]
    return plain


def with_last_block(change: Callable[[BlockOutline], BlockOutline]) -> DecoderOutline:
    decoder = outline(GENERATOR, SMALL)
    return replace(decoder, blocks=(*decoder.blocks[:-1], change(decoder.blocks[-1])))


def with_last_attention(**fields: Any) -> DecoderOutline:
    return with_last_block(lambda block: replace(block, attention=replace(block.attention, **fields)))


def test_cases_say_what_their_decoders_are() -> None:
    kinds = set()
    for case in CONTRACT.cases():
        given = case.make(GENERATOR)
        pool = given[6]
        for decoder in (given[5], with_tensors(given[5], lambda each: each.to("meta"))):
            found = signature_of(decoder, given[0].dtype, pool.dtype, pool.shape[4], 1)
            assert found == case.signature, case.name
        kinds.add(found["plain"])
    assert kinds == {True, False}


def test_sizes_are_the_outlines() -> None:
    found = signature_of(outline(GENERATOR, SMALL), torch.bfloat16, torch.float16, 4, 2)
    assert set(found) == set(CONTRACT.signature) and found["plain"]
    expected = {"heads": 2, "kv_heads": 1, "head_dim": 16, "hidden_size": 32, "inner_size": 48, "blocks": 2}
    expected |= {"page_size": 4, "num_ranks": 2}
    assert expected.items() <= found.items() and found["pool_dtype"] == torch.float16


def other_norm(width: int, eps: float = 1e-5, dtype: torch.dtype = torch.bfloat16) -> NormOutline:
    return NormOutline(torch.ones(width, dtype=dtype), eps)


def without_bias(block: BlockOutline) -> BlockOutline:
    qkv = replace(block.attention.qkv, bias_O=None)
    return replace(block, attention=replace(block.attention, qkv=qkv))


def with_last_down(weight: Any) -> DecoderOutline:
    return with_last_block(
        lambda block: replace(block, mlp=replace(block.mlp, down=replace(block.mlp.down, weights=weight)))
    )


OTHERS: dict[str, Callable[[], DecoderOutline]] = {
    "rotated by other angles": lambda: with_last_attention(rope=1),
    "window": lambda: with_last_attention(window=5),
    "soft cap": lambda: with_last_attention(soft_cap=1.0),
    "another scale": lambda: with_last_attention(scale=0.5),
    "no head norms in one block": lambda: with_last_attention(q_norm=None, k_norm=None),
    "no norm of keys": lambda: with_last_attention(k_norm=None),
    "another eps of heads": lambda: with_last_attention(k_norm=other_norm(16, 1e-6)),
    "another eps": lambda: with_last_block(lambda block: replace(block, post_norm=other_norm(32, 1e-6))),
    "float32 norm": lambda: with_last_attention(q_norm=other_norm(16, dtype=torch.float32)),
    "float32 last norm": lambda: replace(outline(GENERATOR, SMALL), norm=other_norm(32, dtype=torch.float32)),
    "outer norm": lambda: with_last_block(lambda block: replace(block, after_mlp_norm=other_norm(32))),
    "no bias in one block": lambda: with_last_block(without_bias),
    "several pieces": lambda: with_last_down((torch.ones(16, 48).bfloat16(),) * 2),
    "another dtype": lambda: with_last_down((torch.ones(32, 48),)),
    "not contiguous": lambda: with_last_down((torch.ones(48, 32).bfloat16().T,)),
    "not aligned": lambda: with_last_down((torch.ones(32 * 48 + 1).bfloat16()[1:].view(32, 48),)),
    "integers": lambda: with_last_down((matrix(GENERATOR, 32, 64, "8 bits"),)),
    "packed by a library": lambda: with_last_down((torch.ones(32, 48).bfloat16().to_mkldnn(),)),
    "prepared": lambda: with_last_down((object(),)),
    "no blocks": lambda: replace(outline(GENERATOR, SMALL), blocks=()),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_not_plain(other: str) -> None:
    assert is_plain(outline(GENERATOR, SMALL))
    assert not is_plain(OTHERS[other]())
