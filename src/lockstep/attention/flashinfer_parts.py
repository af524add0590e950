"""FlashInfer's kernels, planned on the host once a step for all layers of a kind."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lockstep.attention.backend import AttentionSpec, Span
from lockstep.attention.part import AttentionPart, owned_pages
from lockstep.attention.spans import Spans
from lockstep.kv.pool.pool import LayerKV
from lockstep.ops.attention_decode.kernels.flashinfer import DecodeCalls, FixedBatch
from lockstep.ops.attention_extend.kernels.flashinfer import (
    ExtendCalls,
    LayerKind,
    PlannedCall,
    new_workspace,
)
from lockstep.ops.attention_extend.page_lists import PageLists
from lockstep.ops.contract import Kernel


@dataclass(slots=True)
class ListedStep:
    """A step's lists, and the calls that were planned for them: by the first layer of a kind, for those after it."""

    calls: DecodeCalls | ExtendCalls
    lists: PageLists
    planned: dict[LayerKind, PlannedCall] = field(default_factory=dict)

    def call(self, kind: LayerKind) -> PlannedCall:
        """The planned call for layers of this kind."""
        if kind not in self.planned:
            self.planned[kind] = self.calls.planned(kind, self.lists)
        return self.planned[kind]


class _ListedPart(AttentionPart):
    """What both kinds of spans have in common."""

    def __init__(self, kernel: Kernel) -> None:
        self.provider = kernel.provider
        self._workspace: torch.Tensor | None = None
        self._calls: DecodeCalls | ExtendCalls | None = None

    def plan(self, spans: Sequence[Span], *, page_size: int, device: torch.device) -> ListedStep:
        if self._calls is None:
            self._calls = self._new_calls(self._room(device))
        batch = Spans.of(spans, page_size)
        return ListedStep(self._calls, PageLists.of(owned_pages(batch), page_size, batch.stage))

    def run(
        self, plan: ListedStep, q_TNH: torch.Tensor, kv: LayerKV, spec: AttentionSpec, out_TNH: torch.Tensor
    ) -> None:
        rows = plan.lists.num_rows
        call = plan.call(LayerKind.of(q_TNH, kv.k_NPSH, spec.window))
        call.run(q_TNH[:rows], kv.k_NPSH, kv.v_NPSH, out_TNH[:rows], spec.scale)
        if rows < q_TNH.shape[0]:
            out_TNH[rows:].zero_()

    @abstractmethod
    def _new_calls(self, workspace: torch.Tensor) -> DecodeCalls | ExtendCalls:
        """The calls of eager steps."""

    def _room(self, device: torch.device) -> torch.Tensor:
        """Steps follow each other on one stream, so that all of them, graphs too, may share it."""
        if self._workspace is None:
            self._workspace = new_workspace(device)
        return self._workspace


class FlashInferExtend(_ListedPart):
    """attention_extend by FlashInfer."""

    def _new_calls(self, workspace: torch.Tensor) -> ExtendCalls:
        return ExtendCalls(workspace)


@dataclass(slots=True)
class FixedStep(ListedStep):
    """A step in memory that a graph reads. Which kinds of layers there are shows when it is run before recording."""

    batch: FixedBatch = field(kw_only=True)

    def refill(self, spans: Spans) -> None:
        """Plans every kind's call again, for these sequences."""
        self.lists = self.batch.lists(owned_pages(spans), spans.stage)
        for kind in self.planned:
            self.planned[kind] = self.calls.planned(kind, self.lists)


class FlashInferDecode(_ListedPart):
    """attention_decode by FlashInfer. In graphs: each size has plans of its own, made anew before each replay."""

    @property
    def why_no_graphs(self) -> str | None:
        return None

    def _new_calls(self, workspace: torch.Tensor) -> DecodeCalls:
        return DecodeCalls(workspace)

    def fixed_plan(
        self, num_keys_T: torch.Tensor, *, num_pages: int, page_size: int, shares: bool = False
    ) -> FixedStep:
        device = num_keys_T.device
        batch = FixedBatch(len(num_keys_T), num_pages, page_size, device)
        nobody = batch.lists(owned_pages(Spans.of((), page_size)))
        return FixedStep(DecodeCalls(self._room(device), batch), nobody, batch=batch)

    def refill(self, plan: FixedStep, spans: Sequence[Span]) -> None:
        plan.refill(Spans.of(spans, plan.batch.page_size))
