"""The composition of the operators that a decoder is made of.

Shapes: T rows, D model, F inner width, N query heads, K KV heads, H head dim, B sequences, L blocks, P pages,
S page size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lockstep.ops.add_rms_norm.reference import add_rms_norm
from lockstep.ops.attention_extend.reference import attention_extend
from lockstep.ops.decoder_forward.outline import (
    AttentionOutline,
    BlockOutline,
    DecoderOutline,
    MLPOutline,
    NormOutline,
    ProductOutline,
)
from lockstep.ops.gelu_and_mul.reference import gelu_and_mul
from lockstep.ops.grouped_weight import GroupedWeight
from lockstep.ops.kv_store.reference import kv_store
from lockstep.ops.rms_norm.reference import rms_norm
from lockstep.ops.rope.reference import rope
from lockstep.ops.silu_and_mul.reference import silu_and_mul

Pools = torch.Tensor | Sequence[Any]


def decoder_forward(
    token_ids_T: torch.Tensor,
    positions_T: torch.Tensor,
    slots_T: torch.Tensor,
    page_table_BP: torch.Tensor,
    cu_rows_B1: torch.Tensor,
    num_keys_B: torch.Tensor,
    outline: DecoderOutline,
    kv_L2KPSH: Pools,
) -> torch.Tensor:
    """Hidden rows [T, D] after the last norm; keys and values of the rows are stored in the pools.

    Rows cu_rows[b] .. cu_rows[b + 1] are the last of sequence b's num_keys[b] tokens. Hidden rows are float32
    throughout; keys and values are rounded to the pool's dtype.
    """
    dtype = torch.float64 if kv_L2KPSH[0][0].dtype == torch.float64 else torch.float32
    step = _Step(outline, positions_T, slots_T, (page_table_BP, cu_rows_B1, num_keys_B), dtype)
    residual_TD = _matrix(outline.embedding, dtype)[token_ids_T] * outline.embedding_scale
    update_TD: torch.Tensor | None = None
    for block, kv in zip(outline.blocks, kv_L2KPSH, strict=True):
        residual_TD, update_TD = step.block(block, residual_TD, update_TD, kv)
    assert update_TD is not None
    return add_rms_norm(update_TD, residual_TD, outline.norm.weight.to(dtype), outline.norm.eps)[0]


class _Step:
    """One call: what its blocks share."""

    def __init__(
        self,
        outline: DecoderOutline,
        positions_T: torch.Tensor,
        slots_T: torch.Tensor,
        spans: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        dtype: torch.dtype,
    ) -> None:
        self._outline = outline
        self._slots_T = slots_T
        self._spans = spans
        self._dtype = dtype
        self._angles = [(cos[positions_T], sin[positions_T]) for cos, sin in outline.ropes]

    def block(
        self, block: BlockOutline, residual_TD: torch.Tensor, update_TD: torch.Tensor | None, kv: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if update_TD is None:
            hidden_TD = self._norm(block.input_norm, residual_TD)
        else:
            hidden_TD, residual_TD = self._add_norm(block.input_norm, update_TD, residual_TD)
        update_TD = self._norm(block.after_attention_norm, self._attention(block.attention, hidden_TD, kv))
        hidden_TD, residual_TD = self._add_norm(block.post_norm, update_TD, residual_TD)
        return residual_TD, self._norm(block.after_mlp_norm, self._mlp(block.mlp, hidden_TD))

    def _attention(self, attention: AttentionOutline, hidden_TD: torch.Tensor, kv: Any) -> torch.Tensor:
        outline, (k_pool, v_pool) = self._outline, kv
        num_heads, num_kv_heads = outline.num_heads, outline.num_kv_heads
        heads = product(attention.qkv, hidden_TD).unflatten(1, (-1, outline.head_dim))
        q_TNH, k_TKH, v_TKH = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        cos, sin = self._angles[attention.rope]
        q_TNH = rope(self._norm(attention.q_norm, q_TNH), cos, sin, self._dtype)
        k_TKH = rope(self._norm(attention.k_norm, k_TKH), cos, sin, self._dtype)
        kv_store(k_TKH, v_TKH, k_pool, v_pool, self._slots_T)
        out_TNH = torch.empty_like(q_TNH)
        how = (attention.scale, attention.window, attention.soft_cap)
        attention_extend(q_TNH, k_pool, v_pool, *self._spans, None, out_TNH, *how)
        return product(attention.out, out_TNH.flatten(1))

    def _mlp(self, mlp: MLPOutline, hidden_TD: torch.Tensor) -> torch.Tensor:
        gate_up_T2F, kind = product(mlp.gate_up, hidden_TD), self._outline.activation
        if kind == "silu":
            inner_TF = silu_and_mul(gate_up_T2F)
        else:
            inner_TF = gelu_and_mul(gate_up_T2F, kind == "gelu_tanh")
        return product(mlp.down, inner_TF)

    def _norm(self, norm: NormOutline | None, x: torch.Tensor) -> torch.Tensor:
        return x if norm is None else rms_norm(x, norm.weight.to(self._dtype), norm.eps)

    def _add_norm(
        self, norm: NormOutline, update_TD: torch.Tensor, residual_TD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return add_rms_norm(update_TD, residual_TD, norm.weight.to(self._dtype), norm.eps)


def product(outline: ProductOutline, x_TI: torch.Tensor) -> torch.Tensor:
    """x @ weight^T + bias in the dtype of x."""
    weight_OI = torch.cat([_matrix(weight, x_TI.dtype) for weight in outline.weights])
    bias_O = None if outline.bias_O is None else outline.bias_O.to(x_TI.dtype)
    return torch.nn.functional.linear(x_TI, weight_OI, bias_O)


def _matrix(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    return weight.dequantise(dtype) if isinstance(weight, GroupedWeight) else weight.to(dtype)
