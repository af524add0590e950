"""A whole decoder as one call of the native extension: its own threads, no operator between.

Shapes: T rows, D model, R rows that want scores, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lockstep.core.errors import KernelError
from lockstep.native import extension, thread_pool
from lockstep.ops.contract import Signature
from lockstep.ops.decoder_forward.outline import BlockOutline, DecoderOutline, NormOutline, ProductOutline
from lockstep.ops.grouped_weight import GroupedWeight
from lockstep.ops.native import native_kernels, pack

_LANES = 16
_POOL_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Program:
    """A decoder whose weights are packed. Serves one caller at a time.

    `num_threads` is what the next call uses, at most as many as there are cores for this process.
    """

    def __init__(self, outline: DecoderOutline, instruction_set: str) -> None:
        native = extension()
        assert native is not None
        self.num_threads: int = thread_pool().max_threads
        self._hidden_size = outline.hidden_size
        self._kv: Any = None
        # Packed once for each stored weight: embedding and head may be the same one.
        self._packed: dict[int, Any] = {}
        head = self._product(outline.head)
        self._vocab_size = sum(weight.num_outputs for weight in head)
        self._decoder = native.Decoder(
            thread_pool(),
            instruction_set,
            hidden_size=outline.hidden_size,
            num_heads=outline.num_heads,
            num_kv_heads=outline.num_kv_heads,
            head_dim=outline.head_dim,
            inner_size=outline.inner_size,
            activation=outline.activation,
        )
        self._decoder.embed(self._pack(outline.embedding), outline.embedding_scale)
        for cos, sin in outline.ropes:
            self._decoder.add_rope(cos.contiguous().numpy(), sin.contiguous().numpy())
        for block in outline.blocks:
            self._add(block)
        self._decoder.finish(
            norm=_floats(outline.norm), eps=outline.norm.eps, head=head, soft_cap=outline.soft_cap
        )
        self._packed.clear()

    def step(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        slots_T: torch.Tensor,
        spans: np.ndarray,
        pages: np.ndarray,
        kv: Sequence[Any],
    ) -> torch.Tensor:
        """Hidden rows [T, D], float32. `kv` is a pair of pools for each block; the same object stays bound.

        `spans` (int32) has a row for each sequence: first row, rows, keys, first of its `pages` (int32), and how many
        of its rows, the last ones, are wanted. Rows that are not are zeros.
        """
        if kv is not self._kv:
            self._bind(kv)
        num_rows = token_ids_T.shape[0]
        make = torch.empty if spans[:, 4].sum() == num_rows else torch.zeros
        hidden_TD = make(num_rows, self._hidden_size)
        arrays = (token_ids_T.numpy(), positions_T.numpy(), slots_T.numpy(), spans, pages)
        self._decoder.step(*arrays, self.num_threads, hidden_TD.numpy())
        return hidden_TD

    def scores(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """The head's scores [R, V], float32."""
        padded = -(-self._vocab_size // _LANES) * _LANES
        scores_RV = torch.empty(hidden_RD.shape[0], padded)
        self._decoder.scores(hidden_RD.contiguous().numpy(), self.num_threads, scores_RV.numpy())
        return scores_RV[:, : self._vocab_size]

    def _bind(self, kv: Sequence[Any]) -> None:
        pools = [(k_pool, v_pool) for k_pool, v_pool in kv]
        first = pools[0][0]
        self._decoder.set_pools(
            [_bytes(k_pool) for k_pool, _ in pools],
            [_bytes(v_pool) for _, v_pool in pools],
            dtype=_POOL_DTYPES[first.dtype],
            num_pages=first.shape[1],
            page_size=first.shape[2],
        )
        self._kv = kv

    def _add(self, block: BlockOutline) -> None:
        attention, mlp = block.attention, block.mlp
        self._decoder.add_block(
            eps=block.input_norm.eps,
            input_norm=_floats(block.input_norm),
            qkv=self._product(attention.qkv),
            qkv_bias=_bias(attention.qkv),
            q_norm=_floats(attention.q_norm),
            k_norm=_floats(attention.k_norm),
            out=self._product(attention.out),
            out_bias=_bias(attention.out),
            after_attention_norm=_floats(block.after_attention_norm),
            post_norm=_floats(block.post_norm),
            gate_up=self._product(mlp.gate_up),
            gate_up_bias=_bias(mlp.gate_up),
            down=self._product(mlp.down),
            down_bias=_bias(mlp.down),
            after_mlp_norm=_floats(block.after_mlp_norm),
            rope=attention.rope,
            window=attention.window,
            scale=attention.scale,
            soft_cap=attention.soft_cap,
        )

    def _product(self, product: ProductOutline) -> list[Any]:
        return [self._pack(weight) for weight in product.weights]

    def _pack(self, weight: Any) -> Any:
        if isinstance(weight, torch.Tensor) and weight.layout != torch.strided:
            raise KernelError(
                "decoder_forward.native cannot read what another kernel packed; leave products to native kernels too"
            )
        if not isinstance(weight, torch.Tensor | GroupedWeight):
            return weight
        if id(weight) not in self._packed:
            self._packed[id(weight)] = pack(weight)
        return self._packed[id(weight)]


def prepare(outline: DecoderOutline, *, instruction_set: str) -> Program:
    """Packs what is not packed yet. Raises ValueError where the parts do not fit each other."""
    return Program(outline, instruction_set)


def decoder_forward(
    token_ids_T: torch.Tensor,
    positions_T: torch.Tensor,
    slots_T: torch.Tensor,
    page_table_BP: torch.Tensor,
    cu_rows_B1: torch.Tensor,
    num_keys_B: torch.Tensor,
    program: Program,
    kv_L2KPSH: torch.Tensor,
    *,
    instruction_set: str,
) -> torch.Tensor:
    """See the contract. `program` comes from `prepare`."""
    width = page_table_BP.shape[1]
    first_pages = torch.arange(page_table_BP.shape[0], dtype=torch.int32) * width
    num_rows_B = cu_rows_B1.diff()
    spans = torch.stack((cu_rows_B1[:-1], num_rows_B, num_keys_B, first_pages, num_rows_B), dim=1)
    pages = page_table_BP.contiguous().flatten()
    return program.step(
        token_ids_T, positions_T, slots_T, spans.contiguous().numpy(), pages.numpy(), kv_L2KPSH.unbind()
    )


def _floats(norm: NormOutline | None) -> np.ndarray | None:
    return None if norm is None else norm.weight.float().contiguous().numpy()


def _bias(product: ProductOutline) -> np.ndarray | None:
    return None if product.bias_O is None else product.bias_O.float().contiguous().numpy()


def _bytes(pool: torch.Tensor) -> np.ndarray:
    """The pool's memory, whatever its dtype: numpy knows no bfloat16."""
    return pool.view(torch.uint8).numpy()


def _refuses(signature: Signature) -> str | None:
    if signature["num_ranks"] != 1:
        return "computes all of a model on one rank"
    if signature["dtype"] != torch.bfloat16:
        return f"rounds what products read to 16 bits or fewer, which {signature['dtype']} does not allow"
    if signature["pool_dtype"] not in _POOL_DTYPES:
        return f"stores keys and values as {', '.join(_POOL_DTYPES.values())}, not {signature['pool_dtype']}"
    if signature["head_dim"] % _LANES or signature["inner_size"] % _LANES:
        return f"needs head dims and inner sizes that are multiples of {_LANES}"
    return None


KERNELS = native_kernels("decoder_forward", decoder_forward, refuses=_refuses, prepare=prepare)
