"""What a kernel of decoder_decode is told of a decoder."""

from __future__ import annotations

from typing import Any

import torch

from lockstep.ops.decoder_forward.outline import BlockOutline, DecoderOutline, NormOutline, ProductOutline

_ALIGNED_BYTES = 16
"""What is copied or read together."""


def signature_of(
    outline: DecoderOutline, dtype: torch.dtype, pool_dtype: torch.dtype, page_size: int, num_ranks: int
) -> dict[str, Any]:
    """The signature of a decoder's calls, whatever its weights are and whether or not they have values.

    `plain` decoders are Llama's: each product is one contiguous matrix of plain numbers in `dtype`, that of queries,
    keys and values alone may have a bias; every norm's weight has `dtype`, and nothing is normalised after attention or
    feed-forward; no windows, no soft caps, one rotation. Blocks are alike: in their eps, in the scale of their scores,
    in whether they have a bias and norms of heads.
    """
    return {
        "dtype": dtype,
        "pool_dtype": pool_dtype,
        "hidden_size": outline.hidden_size,
        "inner_size": outline.inner_size,
        "heads": outline.num_heads,
        "kv_heads": outline.num_kv_heads,
        "head_dim": outline.head_dim,
        "page_size": page_size,
        "blocks": len(outline.blocks),
        "activation": outline.activation,
        "plain": _is_plain(outline, dtype),
        "head_norms": any(block.attention.q_norm is not None for block in outline.blocks),
        "qkv_bias": any(block.attention.qkv.bias_O is not None for block in outline.blocks),
        "num_ranks": num_ranks,
    }


def _is_plain(outline: DecoderOutline, dtype: torch.dtype) -> bool:
    blocks = outline.blocks
    # A kernel reads these once for all blocks.
    stream_eps = {norm.eps for block in blocks for norm in (block.input_norm, block.post_norm)}
    head_eps = {None if norm is None else norm.eps for block in blocks for norm in _head_norms(block)}
    scales = {block.attention.scale for block in blocks}
    has_bias = {block.attention.qkv.bias_O is not None for block in blocks}
    return (
        stream_eps == {outline.norm.eps}
        and len(head_eps) == len(scales) == len(has_bias) == 1
        and all(_is_plain_block(block, dtype) for block in blocks)
        and _is_plain_tensor(outline.norm.weight, dtype)
    )


def _is_plain_block(block: BlockOutline, dtype: torch.dtype) -> bool:
    attention, mlp = block.attention, block.mlp
    norms = (block.input_norm, block.post_norm, *_head_norms(block))
    products = (attention.out, mlp.gate_up, mlp.down)
    return (
        _is_plain_product(attention.qkv, dtype)
        and all(_is_plain_product(product, dtype) and product.bias_O is None for product in products)
        and all(_is_plain_tensor(norm.weight, dtype) for norm in norms if norm is not None)
        and block.after_attention_norm is None
        and block.after_mlp_norm is None
        and (attention.rope, attention.window, attention.soft_cap) == (0, 0, 0.0)
    )


def _head_norms(block: BlockOutline) -> tuple[NormOutline | None, NormOutline | None]:
    return block.attention.q_norm, block.attention.k_norm


def _is_plain_product(product: ProductOutline, dtype: torch.dtype) -> bool:
    tensors = (*product.weights, *(() if product.bias_O is None else (product.bias_O,)))
    return len(product.weights) == 1 and all(_is_plain_tensor(each, dtype) for each in tensors)


def _is_plain_tensor(value: Any, dtype: torch.dtype) -> bool:
    # Tensors that a library has packed have a layout of their own.
    is_strided = isinstance(value, torch.Tensor) and value.layout == torch.strided
    return (
        is_strided and value.dtype == dtype and value.is_contiguous() and value.data_ptr() % _ALIGNED_BYTES == 0
    )
