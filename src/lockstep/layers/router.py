"""Which experts see a token: routing of the normalised residual stream.

Shapes: T tokens, D model, E experts, K experts of each token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from lockstep.layers.build import Build
from lockstep.layers.linear import Product
from lockstep.layers.norm import AddRMSNorm, NormSpec, whole_update
from lockstep.ops.contract import Kernel
from lockstep.parallel.placement import Partial, expect_whole


class Routed(NamedTuple):
    """Normalised rows [T, D], which experts read, the residual stream [T, D], weights float32 and ids int32 [T, K]."""

    hidden_TD: torch.Tensor
    residual_TD: torch.Tensor
    weights_TK: torch.Tensor
    ids_TK: torch.Tensor


class SoftmaxRouter:
    """Normalises residual + update and picks the K likeliest of all experts for each row; every rank picks the same.

    Takes the update and the residual stream [T, D], which must not be used again. An update that is Partial is resolved
    before it is added, whatever kernel adds it. By one kernel where there is one and no probe watches what lies
    between. `renormalise`: the chosen weights of a row are divided by their sum.
    """

    def __init__(
        self, build: Build, where: str, norm: NormSpec, *, num_experts: int, top_k: int, renormalise: bool
    ) -> None:
        weight_ED = build.weight(f"{where}.weight", (num_experts, norm.width))
        routing: dict[str, Any] = {"experts": num_experts, "top_k": top_k, "renormalise": renormalise}
        fused = None
        if not norm.is_watched(build) and build.point(where, _AXES) is None:
            fused = build.bind_fused(
                "add_norm_route", where, weight_dtype=norm.dtype(build), inputs=norm.width, adds=True, **routing
            )
        self._run: _FusedRouter | _RouterInParts
        if fused is not None:
            self._run = _FusedRouter(build, where, norm, fused.kernel, weight_ED)
        else:
            self._run = _RouterInParts(build, where, norm, weight_ED, routing)
        self._choice = (top_k, renormalise)

    def __call__(self, update: Partial | torch.Tensor, residual_TD: torch.Tensor) -> Routed:
        return self._run(update, residual_TD, *self._choice)


_AXES = ("token", "expert")


class _FusedRouter:
    def __init__(
        self, build: Build, where: str, norm: NormSpec, kernel: Kernel, weight_ED: torch.Tensor
    ) -> None:
        self._norm = norm.load(build)
        self._weight = kernel.prepare(weight_ED) if kernel.prepare and not weight_ED.is_meta else weight_ED
        self._function = kernel.function
        self._where, self._mesh = where, build.mesh

    def __call__(
        self, update: Partial | torch.Tensor, residual_TD: torch.Tensor, top_k: int, renormalise: bool
    ) -> Routed:
        update_TD = whole_update(update, self._mesh, self._where)
        residual_TD = expect_whole(residual_TD, self._where)
        norm = (self._norm.weight, self._norm.eps)
        return Routed(*self._function(update_TD, residual_TD, *norm, self._weight, top_k, renormalise))


class _RouterInParts:
    def __init__(
        self, build: Build, where: str, norm: NormSpec, weight_ED: torch.Tensor, routing: dict[str, Any]
    ) -> None:
        self._add_norm = AddRMSNorm.of(build, norm)
        self._product = Product(build, where, (weight_ED,), None)
        self._choose = build.bind("moe_topk_softmax", where, **routing).function
        self._point = build.point(where, _AXES)

    def __call__(
        self, update: Partial | torch.Tensor, residual_TD: torch.Tensor, top_k: int, renormalise: bool
    ) -> Routed:
        hidden_TD, residual_TD = self._add_norm(update, residual_TD)
        logits_TE = self._product(hidden_TD)
        if self._point is not None:
            self._point(logits_TE)
        return Routed(hidden_TD, residual_TD, *self._choose(logits_TE, top_k, renormalise))
