"""Self-attention over paged keys and values.

Shapes: T tokens, R of them that are wanted, D model, N query heads, A all heads (query, key, value), H head dim (heads
are this rank's).
"""

from __future__ import annotations

import torch

from lockstep.attention.backend import AttentionSpec, FreshHeads
from lockstep.core.errors import ConfigError
from lockstep.kv.pool.pool import KVShape
from lockstep.layers.build import Build, ForwardContext
from lockstep.layers.heads import CosSin, NewHeads
from lockstep.layers.linear import TP, Part, RowParallelLinear, share
from lockstep.layers.norm import NormSpec
from lockstep.layers.normed_linear import NormedLinear, Update
from lockstep.ops.contract import Signature
from lockstep.ops.decoder_forward.outline import AttentionOutline, NormOutline
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
    """Attends to what is in the pool, with the backend bound for the step. `layer` is its number there.

    `new_heads` as in Build.add_attention.
    """

    def __init__(
        self,
        build: Build,
        where: str,
        heads: tuple[int, int],
        head_dim: int,
        spec: AttentionSpec,
        new_heads: Signature | None = None,
    ) -> None:
        num_heads, num_kv_heads = heads
        self.spec = spec
        self.layer = build.add_attention(KVShape(num_kv_heads, head_dim), num_heads, spec, new_heads)
        self._point = build.point(where, ("token", "head", "head_dim"), "sharded:tp:1")

    def __call__(self, ctx: ForwardContext, q_TNH: torch.Tensor) -> torch.Tensor:
        return self._seen(ctx.attention.run(ctx.plan, q_TNH, ctx.kv.layer(self.layer), self.spec))

    def of_fresh(self, ctx: ForwardContext, fresh: FreshHeads) -> torch.Tensor:
        """Makes new heads ready, stores keys and values and attends, where the backend takes them so."""
        return self._seen(ctx.attention.run_fresh(ctx.plan, fresh, ctx.kv.layer(self.layer), self.spec))

    def _seen(self, out_TNH: torch.Tensor) -> torch.Tensor:
        if self._point is not None:
            self._point(out_TNH)
        return out_TNH


class SelfAttention:
    """Query, key and value products, optional head norms, rope, attention, output product.

    Takes an update and the residual stream [T, D], whose normalised sum it reads (see NormedLinear; `adds` says whether
    updates will come). Gives the next update, Partial [T, D], and the stream with the last one. `head_norms` turns on
    RMS norms of each query and key head (Qwen 3, Gemma 3), which are stored as `norm` is.

    With `selects`, which is for a model's last block, both are [R, D], of the rows that the step wants alone: the keys
    and values of the others are stored, and no row looks at another one from here on.
    """

    def __init__(
        self,
        build: Build,
        where: str,
        *,
        norm: NormSpec,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        spec: AttentionSpec,
        qkv_bias: bool = False,
        out_bias: bool = False,
        head_norms: bool = False,
        adds: bool = True,
        selects: bool = False,
        axis: Axis = TP,
    ) -> None:
        group = build.mesh.group(axis)
        parts = head_parts(where, num_heads, num_kv_heads, head_dim, group.rank, group.size)
        self.where = where
        self._axis = axis
        self._selects = selects
        self._head_dim = head_dim
        heads = (parts[0].length // head_dim, parts[1].length // head_dim)
        self._dtype = build.dtype
        self._qkv = NormedLinear(build, f"{where}.qkv_proj", norm, parts, adds=adds, bias=qkv_bias, axis=axis)
        self._out = RowParallelLinear(
            build,
            f"{where}.o_proj",
            parts[0].as_input(f"{where}.o_proj"),
            norm.width,
            bias=out_bias,
            axis=axis,
        )
        norms = None
        if head_norms:
            like_norm = (head_dim, norm.eps, norm.stored_minus_one)
            norms = (NormSpec(f"{where}.q_norm", *like_norm), NormSpec(f"{where}.k_norm", *like_norm))
        self._new_heads = NewHeads(build, where, *heads, head_dim, norms)
        self._attention = Attention(build, where, heads, head_dim, spec, self._new_heads.signature)

    def outline(self, rope: int) -> tuple[NormOutline, AttentionOutline]:
        """Its norm, and what follows with rotation number `rope`, for a kernel of a whole decoder."""
        spec = self._attention.spec
        norm, qkv = self._qkv.outline()
        return norm, AttentionOutline(
            qkv,
            self._out.product.outline(),
            rope,
            spec.scale,
            spec.window,
            spec.soft_cap,
            *self._new_heads.outline(),
        )

    def __call__(
        self, ctx: ForwardContext, update: Update, residual_TD: torch.Tensor, cos_sin: CosSin
    ) -> tuple[Partial, torch.Tensor]:
        qkv, residual_TD = self._qkv(update, residual_TD)
        packed = expect_sharded(qkv, self._axis, self.where)
        heads_TAH = packed.view(packed.shape[0], -1, self._head_dim)
        if ctx.attention.takes_fresh(ctx.plan):
            out_TNH = self._attention.of_fresh(ctx, self._new_heads.fresh(heads_TAH, cos_sin))
        else:
            kv = ctx.kv.layer(self._attention.layer)
            out_TNH = self._attention(ctx, self._new_heads(heads_TAH, cos_sin, kv, ctx.slots_T))
        if self._selects:
            out_TNH, residual_TD = ctx.keep_wanted(out_TNH), ctx.keep_wanted(residual_TD)
        merged = out_TNH.flatten(1).to(self._dtype)
        return self._out(Sharded(merged, self._axis, -1, self.where)), residual_TD
