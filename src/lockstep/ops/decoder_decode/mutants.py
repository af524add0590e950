"""Known-wrong versions of decoder_decode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lockstep.ops.decoder_decode.reference import decode_at, decoder_decode
from lockstep.ops.decoder_forward.outline import BlockOutline, DecoderOutline, NormOutline, ProductOutline
from lockstep.ops.grouped_weight import GroupedWeight
from lockstep.ops.norm_rope_attention_decode.reference import new_slots

_Mutant = Callable[..., torch.Tensor]
_Given = dict[str, Any]

_NAMES = ("embedded", "cos", "sin", "page_table", "num_keys", "outline", "kv")


def _with(change: Callable[[_Given], _Given]) -> _Mutant:
    """The reference on other arguments than those given; `slots` among them are where new tokens go."""

    def wrong(*given: Any) -> torch.Tensor:
        named = dict(zip(_NAMES, given, strict=True))
        slots = new_slots(named["page_table"], named["num_keys"], _page_size(named))
        changed = {"slots": slots} | named
        changed |= change(changed)
        return decode_at(*changed.values())

    return wrong


def _with_outline(change: Callable[[DecoderOutline], DecoderOutline]) -> _Mutant:
    return _with(lambda given: {"outline": change(given["outline"])})


def _with_blocks(change: Callable[[BlockOutline, DecoderOutline], BlockOutline]) -> _Mutant:
    def changed(outline: DecoderOutline) -> DecoderOutline:
        return replace(outline, blocks=tuple(change(block, outline) for block in outline.blocks))

    return _with_outline(changed)


def _page_size(given: _Given) -> int:
    size: int = given["kv"].shape[4]
    return size


def _half_angles(given: _Given) -> _Given:
    angles = torch.atan2(given["sin"], given["cos"]) / 2
    return {"cos": angles.cos(), "sin": angles.sin()}


def _angles_of_another(given: _Given) -> _Given:
    return {name: given[name].roll(1, 0) for name in ("cos", "sin")}


def _last_key_missing(given: _Given) -> _Given:
    num_keys = given["num_keys"]
    return {"num_keys": num_keys.where(num_keys < 2, num_keys - 1)}


def _whole_pages_seen(given: _Given) -> _Given:
    size = _page_size(given)
    return {"num_keys": (given["num_keys"] + size - 1) // size * size}


def _first_page_missing(given: _Given) -> _Given:
    table, num_keys, size = given["page_table"], given["num_keys"], _page_size(given)
    is_longer = num_keys > size
    return {
        "page_table": torch.where(is_longer[:, None], table.roll(-1, 1), table),
        "num_keys": num_keys.where(~is_longer, num_keys - size),
    }


def _pages_of_another(given: _Given) -> _Given:
    # A table may end earlier than this row's pages: any page will do there.
    return {"page_table": given["page_table"].roll(1, 0).clamp(min=0)}


def _into_a_copy(pool: int) -> Callable[[_Given], _Given]:
    """What is new is attended, but stored in none of the pool's own slots."""

    def changed(given: _Given) -> _Given:
        return {
            "kv": [[each.clone() if at == pool else each for at, each in enumerate(kv)] for kv in given["kv"]]
        }

    return changed


def _value_in_the_next_slot(*given: Any) -> torch.Tensor:
    named = dict(zip(_NAMES, given, strict=True))
    kv, size = named["kv"], _page_size(named)
    slots = new_slots(named["page_table"], named["num_keys"], size)
    taken = slots[slots >= 0]
    after = (taken + 1) % (kv.shape[3] * size)
    before = kv.clone()
    out = decoder_decode(*given)
    new_values = kv[:, 1].flatten(2, 3)[:, :, taken].clone()
    values = before[:, 1].flatten(2, 3)
    values[:, :, after] = new_values
    kv[:, 1] = values.view_as(kv[:, 1])
    return out


def _pools_of_other_blocks(given: _Given) -> _Given:
    return {"kv": list(given["kv"])[::-1]}


def _stream_lost(*given: Any) -> torch.Tensor:
    """The first block's input is not added to what its attention gives: it is too small to matter after its norm."""
    outline, rows = given[5], given[0].float() * 2.0**-30
    first, *rest = outline.blocks
    small = replace(first, input_norm=replace(first.input_norm, eps=first.input_norm.eps * 2.0**-60))
    changed = (rows, *given[1:5], replace(outline, blocks=(small, *rest)), given[6])
    return decoder_decode(*changed).to(given[0].dtype)


def _one_block_short(outline: DecoderOutline) -> DecoderOutline:
    return replace(outline, blocks=(outline.blocks[0], *outline.blocks[:-1]))


def _last_norm_missing(outline: DecoderOutline) -> DecoderOutline:
    # Beside such an eps the rows are nothing: what it divides by is what the weight multiplies with.
    width = torch.full_like(outline.norm.weight, 2.0**40, dtype=torch.float32)
    return replace(outline, norm=NormOutline(width, 2.0**80))


def _norms_swapped(block: BlockOutline, outline: DecoderOutline) -> BlockOutline:
    return replace(block, input_norm=block.post_norm, post_norm=block.input_norm)


def _unscaled(block: BlockOutline, outline: DecoderOutline) -> BlockOutline:
    return replace(block, attention=replace(block.attention, scale=1.0))


def _without_head_norms(block: BlockOutline, outline: DecoderOutline) -> BlockOutline:
    return replace(block, attention=replace(block.attention, q_norm=None, k_norm=None))


def _without_bias(block: BlockOutline, outline: DecoderOutline) -> BlockOutline:
    qkv = replace(block.attention.qkv, bias_O=None)
    return replace(block, attention=replace(block.attention, qkv=qkv))


def _heads_in_another_order(block: BlockOutline, outline: DecoderOutline) -> BlockOutline:
    """Query head n reads KV head n % K: heads are moved to where the reference reads that one, and back."""
    heads, kv_heads, size = outline.num_heads, outline.num_kv_heads, outline.head_dim
    queries = torch.arange(heads * size).view(-1, kv_heads, size).transpose(0, 1).flatten()
    qkv, out = block.attention.qkv, block.attention.out
    order = torch.cat((queries, torch.arange(heads * size, (heads + 2 * kv_heads) * size)))
    bias = None if qkv.bias_O is None else qkv.bias_O[order]
    moved = replace(
        block.attention,
        qkv=ProductOutline((_matrix(qkv)[order],), bias),
        out=replace(out, weights=(_matrix(out)[:, queries],)),
    )
    return replace(block, attention=moved)


def _gate_and_up_swapped(block: BlockOutline, outline: DecoderOutline) -> BlockOutline:
    product = block.mlp.gate_up
    swapped = replace(product, weights=(_matrix(product).roll(outline.inner_size, 0),))
    return replace(block, mlp=replace(block.mlp, gate_up=swapped))


def _matrix(product: ProductOutline) -> torch.Tensor:
    """Its only weight, as plain numbers."""
    (weight,) = product.weights
    plain: torch.Tensor = weight.dequantise() if isinstance(weight, GroupedWeight) else weight
    return plain


MUTANTS: dict[str, _Mutant] = {
    "half angles": _with(_half_angles),
    "another row's angles": _with(_angles_of_another),
    "last key not seen": _with(_last_key_missing),
    "keys behind the last seen": _with(_whole_pages_seen),
    "first page not seen": _with(_first_page_missing),
    "another row's pages": _with(_pages_of_another),
    "new key not stored": _with(_into_a_copy(0)),
    "new value not stored": _with(_into_a_copy(1)),
    "new value stored in the next slot": _value_in_the_next_slot,
    "pools of other blocks": _with(_pools_of_other_blocks),
    "stream not added after attention": _stream_lost,
    "first block instead of the last": _with_outline(_one_block_short),
    "last norm left out": _with_outline(_last_norm_missing),
    "norms swapped": _with_blocks(_norms_swapped),
    "scores not scaled": _with_blocks(_unscaled),
    "head norms ignored": _with_blocks(_without_head_norms),
    "bias ignored": _with_blocks(_without_bias),
    "query head n reads KV head n % K": _with_blocks(_heads_in_another_order),
    "gate and up swapped": _with_blocks(_gate_and_up_swapped),
}
