"""A built model whose blocks one kernel computes together, always or in small steps of single tokens.

Shapes: T tokens, R rows that are wanted, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lockstep.core.errors import KernelError
from lockstep.kv.pool.pool import KVPool
from lockstep.layers.build import Build, ForwardContext
from lockstep.layers.tokens import Tokens
from lockstep.models.llm.decoder import DecoderModel
from lockstep.ops.contract import Kernel
from lockstep.ops.selection import Binding


class FusedDecoder(DecoderModel):
    """A kernel of decoder_forward in the place of a model's layers. Steps are planned by SpanBackend."""

    def __init__(self, model: DecoderModel, program: Any) -> None:
        self.config = model.config
        self.head = model.head
        self._program = program
        self._bound: tuple[KVPool, list[Any]] | None = None

    @classmethod
    def make(cls, build: Build, config: Mapping[str, Any]) -> DecoderModel:
        raise KernelError("a fused decoder is made of a built model: see `fuse`")

    def set_num_threads(self, num_threads: int) -> None:
        """Threads of the steps to come."""
        self._program.num_threads = num_threads

    def forward(self, ctx: ForwardContext, tokens: Tokens) -> torch.Tensor:
        if self._bound is None or self._bound[0] is not ctx.kv:
            self._bound = (ctx.kv, [(layer.k_NPSH, layer.v_NPSH) for layer in ctx.kv.layers])
        inputs = (tokens.ids(), ctx.positions_T, ctx.slots_T, ctx.plan.spans, ctx.plan.pages)
        # The program leaves out the end of rows that nobody reads, too: it is told of them by the spans.
        hidden_TD: torch.Tensor = self._program.step(*inputs, self._bound[1])
        return ctx.keep_wanted(hidden_TD)

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        scores_RV: torch.Tensor = self._program.scores(hidden_RD)
        return scores_RV


def fuse(model: DecoderModel, binding: Binding) -> FusedDecoder:
    """The model with its blocks computed by the bound kernel. Raises KernelError for a model without an outline."""
    prepare = binding.kernel.prepare
    if prepare is None:
        raise KernelError(f"{binding.kernel.provider} computes no whole decoder")
    return FusedDecoder(model, prepare(model.outline()))


class FewRowsFused(DecoderModel):
    """A model whose steps of a few single tokens a kernel of decoder_decode computes, where none share keys.

    A few are as many as the kernel's program says. All other steps are the model's own.
    """

    def __init__(self, model: DecoderModel, kernel: Kernel) -> None:
        assert kernel.prepare is not None
        self.config = model.config
        self.head = model.head
        self._model = model
        self._function = kernel.function
        self._program = kernel.prepare(model.outline())
        self._bound: tuple[KVPool, torch.Tensor] | None = None

    @classmethod
    def make(cls, build: Build, config: Mapping[str, Any]) -> DecoderModel:
        raise KernelError("such a decoder is made of a built model")

    def forward(self, ctx: ForwardContext, tokens: Tokens) -> torch.Tensor:
        num_rows = len(tokens)
        single = ctx.attention.single_tokens(ctx.plan) if num_rows <= self._program.most_rows else None
        if single is None or len(single.num_keys_B) != num_rows:
            return self._model.forward(ctx, tokens)
        if self._bound is None or self._bound[0] is not ctx.kv:
            (stack,) = ctx.kv.stacks
            self._bound = (ctx.kv, stack.unflatten(0, (-1, 2)))
        residual_TD, cos_sin = self._model.begin(ctx, tokens)
        hidden_TD: torch.Tensor = self._function(residual_TD, *cos_sin, *single, self._program, self._bound[1])
        return ctx.keep_wanted(hidden_TD)

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        return self._model.logits(hidden_RD)
