"""What happens to new heads between their product and attention.

Shapes: T tokens, A all heads (N query, then K key, then K value heads; this rank's), H head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lockstep.attention.backend import FreshHeads
from lockstep.kv.pool.pool import LayerKV
from lockstep.layers.build import Build
from lockstep.layers.norm import NormSpec, RMSNorm
from lockstep.ops.contract import Signature
from lockstep.ops.decoder_forward.outline import NormOutline

CosSin = tuple[torch.Tensor, torch.Tensor]
"""cos and sin [T, H / 2], float32, of each row's position."""

HeadNorms = tuple[NormSpec, NormSpec]
"""The norm of each query head, and of each key head."""


class NewHeads:
    """Normalises (where the model does) and rotates query and key heads, and stores keys and values in the pool.

    Gives the query heads [T, N, H], ready to attend. Heads leave in the pool's dtype: on processors that is float32,
    which attends faster and rounds less. By one kernel where there is one and no probe watches the norms: `signature`
    then says what it reads, and is None elsewhere.
    """

    def __init__(
        self,
        build: Build,
        where: str,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        norms: HeadNorms | None,
    ) -> None:
        fused, weight_dtype = None, None if norms is None else norms[0].dtype(build)
        if norms is None or not any(norm.is_watched(build) for norm in norms):
            fused = build.bind_fused(
                "norm_rope_store",
                where,
                pool_dtype=build.kv_dtype,
                weight_dtype=weight_dtype,
                heads=num_heads,
                kv_heads=num_kv_heads,
                head_dim=head_dim,
                page_size=build.page_size,
            )
        self.signature: Signature | None = None
        self._run: _FusedHeads | _HeadsInParts
        if fused is not None:
            self.signature = {"dtype": build.dtype, "weight_dtype": weight_dtype}
            self._run = _FusedHeads(build, num_heads, fused.function, norms)
        else:
            self._run = _HeadsInParts(build, where, num_kv_heads, head_dim, norms)

    def __call__(
        self, heads_TAH: torch.Tensor, cos_sin: CosSin, kv: LayerKV, slots_T: torch.Tensor
    ) -> torch.Tensor:
        return self._run(heads_TAH, cos_sin, kv, slots_T)

    def fresh(self, heads_TAH: torch.Tensor, cos_sin: CosSin) -> FreshHeads:
        """The heads as they are, for attention that makes them ready itself."""
        q_norm, k_norm = self.outline()
        if q_norm is None or k_norm is None:
            return FreshHeads(heads_TAH, None, None, 0.0, *cos_sin)
        return FreshHeads(heads_TAH, q_norm.weight, k_norm.weight, q_norm.eps, *cos_sin)

    def outline(self) -> tuple[NormOutline | None, NormOutline | None]:
        """The norms of query and key heads, for a kernel of a whole decoder."""
        return self._run.norms


class _FusedHeads:
    def __init__(
        self, build: Build, num_heads: int, function: Callable[..., None], norms: HeadNorms | None
    ) -> None:
        self.norms = (None, None) if norms is None else (norms[0].load(build), norms[1].load(build))
        self._function = function
        self._weights = tuple(None if norm is None else norm.weight for norm in self.norms)
        self._eps = 0.0 if norms is None else norms[0].eps
        self._num_heads = num_heads

    def __call__(
        self, heads_TAH: torch.Tensor, cos_sin: CosSin, kv: LayerKV, slots_T: torch.Tensor
    ) -> torch.Tensor:
        size = (heads_TAH.shape[0], self._num_heads, heads_TAH.shape[2])
        q_TNH = heads_TAH.new_empty(size, dtype=kv.k_NPSH.dtype)
        pools = (kv.k_NPSH, kv.v_NPSH)
        self._function(heads_TAH, *self._weights, self._eps, *cos_sin, *pools, slots_T, q_TNH)
        return q_TNH


class _HeadsInParts:
    def __init__(
        self, build: Build, where: str, num_kv_heads: int, head_dim: int, norms: HeadNorms | None
    ) -> None:
        self._norms: tuple[RMSNorm, RMSNorm] | None = None
        self.norms: tuple[NormOutline | None, NormOutline | None] = (None, None)
        if norms is not None:
            q_norm, k_norm = self._norms = (RMSNorm.of(build, norms[0]), RMSNorm.of(build, norms[1]))
            self.norms = (q_norm.outline(), k_norm.outline())
        self._num_kv_heads, self._dtype = num_kv_heads, build.kv_dtype
        self._rope = build.bind(
            "rope", where, out_dtype=build.kv_dtype, head_dim=head_dim, rotated=head_dim, interleaved=False
        ).function
        self._store = build.bind(
            "kv_store", where, pool_dtype=build.kv_dtype, page_size=build.page_size
        ).function

    def __call__(
        self, heads_TAH: torch.Tensor, cos_sin: CosSin, kv: LayerKV, slots_T: torch.Tensor
    ) -> torch.Tensor:
        num_k = self._num_kv_heads
        num_q = heads_TAH.shape[1] - 2 * num_k
        if self._norms is None:
            rotated = self._rope(heads_TAH[:, : num_q + num_k], *cos_sin, self._dtype)
            q_TNH, k_TKH = rotated[:, :num_q], rotated[:, num_q:]
        else:
            q_norm, k_norm = self._norms
            q_TNH = self._rope(q_norm(heads_TAH[:, :num_q]), *cos_sin, self._dtype)
            k_TKH = self._rope(k_norm(heads_TAH[:, num_q : num_q + num_k]), *cos_sin, self._dtype)
        self._store(k_TKH, heads_TAH[:, num_q + num_k :], kv.k_NPSH, kv.v_NPSH, slots_T)
        return q_TNH
