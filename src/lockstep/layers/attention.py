"""Self-attention over paged keys and values.

Shapes: T tokens, D model, N query heads, K KV heads, H head dim (heads are this rank's).
"""

from __future__ import annotations

import torch

from lockstep.attention.backend import AttentionSpec
from lockstep.core.errors import ConfigError
from lockstep.kv.pool.pool import KVShape
from lockstep.layers.build import Build, ForwardContext
from lockstep.layers.linear import TP, ColumnParallelLinear, Part, RowParallelLinear, share
from lockstep.layers.norm import RMSNorm
from lockstep.ops.decoder_forward.outline import AttentionOutline
from lockstep.parallel.mesh import Axis
from lockstep.parallel.placement import Partial, Sharded, expect_sharded


def head_parts(
    where: str, num_heads: int, num_kv_heads: int, head_dim: int, rank: int, num_ranks: int
) -> tuple[Part, Part, Part]:
    """This rank's query, key and value outputs: whole KV heads, each with the query heads that read it.

    The shares may differ by one KV head. With more ranks than KV heads, several ranks hold the same KV head and
    share its query heads evenly. Raises ConfigError when that is not possible.
    """
    group = num_heads // num_kv_heads
    if num_ranks <= num_kv_heads:
        kv_start, kv_share = share(num_kv_heads, rank, num_ranks)
        q_start, q_share = kv_start * group, kv_share * group
    elif num_ranks % num_kv_heads == 0 and group % (num_ranks // num_kv_heads) == 0:
        kv_start, kv_share = rank * num_kv_heads // num_ranks, 1
        q_start, q_share = share(num_heads, rank, num_ranks)
    else:
        raise ConfigError(
            f"{num_heads} query and {num_kv_heads} KV heads cannot be shared out over --tp {num_ranks}"
        )
    kv = (num_kv_heads * head_dim, kv_start * head_dim, kv_share * head_dim)
    return (
        Part(f"{where}.q_proj", num_heads * head_dim, q_start * head_dim, q_share * head_dim),
        Part(f"{where}.k_proj", *kv),
        Part(f"{where}.v_proj", *kv),
    )


class Attention:
    """Stores new keys and values, then attends with the backend bound for the step."""

    def __init__(
        self, build: Build, where: str, heads: tuple[int, int], head_dim: int, spec: AttentionSpec
    ) -> None:
        num_heads, num_kv_heads = heads
        self.spec = spec
        self._layer = build.add_attention(KVShape(num_kv_heads, head_dim), num_heads, spec)
        self._store = build.bind(
            "kv_store", where, pool_dtype=build.kv_dtype, page_size=build.page_size
        ).function
        self._point = build.point(where, ("token", "head", "head_dim"), "sharded:tp:1")

    def __call__(
        self, ctx: ForwardContext, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor
    ) -> torch.Tensor:
        kv = ctx.kv.layers[self._layer]
        self._store(k_TKH, v_TKH, kv.k_NPSH, kv.v_NPSH, ctx.slots_T)
        out_TNH = ctx.attention.run(ctx.plan, q_TNH, kv, self.spec)
        if self._point is not None:
            self._point(out_TNH)
        return out_TNH


class SelfAttention:
    """Query, key and value products, optional head norms, rope, attention, output product.

    Takes a whole [T, D], gives Partial [T, D]. `head_norm_eps` turns on RMS norms of each query and key head
    (Qwen 3, Gemma 3).
    """

    def __init__(
        self,
        build: Build,
        where: str,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        spec: AttentionSpec,
        qkv_bias: bool = False,
        out_bias: bool = False,
        head_norm_eps: float | None = None,
        norm_stored_minus_one: bool = False,
        axis: Axis = TP,
    ) -> None:
        group = build.mesh.group(axis)
        parts = head_parts(where, num_heads, num_kv_heads, head_dim, group.rank, group.size)
        self.where = where
        self._axis = axis
        self._head_dim = head_dim
        self._num_heads, self._num_kv_heads = parts[0].length // head_dim, parts[1].length // head_dim
        self._dtype, self._kv_dtype = build.dtype, build.kv_dtype
        self._qkv = ColumnParallelLinear(
            build, f"{where}.qkv_proj", parts, hidden_size, bias=qkv_bias, axis=axis
        )
        self._out = RowParallelLinear(
            build,
            f"{where}.o_proj",
            parts[0].as_input(f"{where}.o_proj"),
            hidden_size,
            bias=out_bias,
            axis=axis,
        )
        self._norms: tuple[RMSNorm, RMSNorm] | None = None
        if head_norm_eps is not None:
            q_norm, k_norm = (
                RMSNorm(
                    build, f"{where}.{name}", head_dim, head_norm_eps, stored_minus_one=norm_stored_minus_one
                )
                for name in ("q_norm", "k_norm")
            )
            self._norms = (q_norm, k_norm)
        self._rope = build.bind(
            "rope",
            where,
            out_dtype=build.kv_dtype,
            head_dim=head_dim,
            rotated=head_dim,
            interleaved=False,
        ).function
        self._attention = Attention(build, where, (self._num_heads, self._num_kv_heads), head_dim, spec)

    def outline(self, rope: int) -> AttentionOutline:
        """What it computes with rotation number `rope`, for a kernel of a whole decoder."""
        spec = self._attention.spec
        q_norm, k_norm = (None, None) if self._norms is None else (norm.outline() for norm in self._norms)
        return AttentionOutline(
            self._qkv.product.outline(),
            self._out.product.outline(),
            rope,
            spec.scale,
            spec.window,
            spec.soft_cap,
            q_norm,
            k_norm,
        )

    def __call__(
        self, ctx: ForwardContext, hidden_TD: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]
    ) -> Partial:
        qkv = expect_sharded(self._qkv(hidden_TD), self._axis, self.where)
        heads_TNH = qkv.view(qkv.shape[0], -1, self._head_dim)
        num_qk = self._num_heads + self._num_kv_heads
        cos, sin = cos_sin
        v_TKH = heads_TNH[:, num_qk:]
        # Rotated heads leave in the pool's dtype: on processors that is float32, which attends faster and rounds less.
        if self._norms is None:
            rotated = self._rope(heads_TNH[:, :num_qk], cos, sin, self._kv_dtype)
            q_TNH, k_TKH = rotated[:, : self._num_heads], rotated[:, self._num_heads :]
        else:
            q_norm, k_norm = self._norms
            q_TNH = self._rope(q_norm(heads_TNH[:, : self._num_heads]), cos, sin, self._kv_dtype)
            k_TKH = self._rope(k_norm(heads_TNH[:, self._num_heads : num_qk]), cos, sin, self._kv_dtype)
        out_TNH = self._attention(ctx, q_TNH, k_TKH, v_TKH)
        merged = out_TNH.flatten(1).to(self._dtype)
        return self._out(Sharded(merged, self._axis, -1, self.where))
