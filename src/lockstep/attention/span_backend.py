"""The plan of a step for kernels that compute whole decoders: they attend themselves, and need only who owns what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lockstep.attention.backend import AttentionBackend, AttentionSpec, Span
from lockstep.attention.spans import Spans
from lockstep.core.errors import KernelError
from lockstep.kv.pool.pool import LayerKV


@dataclass(frozen=True, slots=True)
class SpanTables:
    """int32 rows (first row, rows, keys, first of its pages, rows wanted) of each sequence, and all pages in a row."""

    spans: np.ndarray
    pages: np.ndarray


class SpanBackend(AttentionBackend):
    """Plans and never runs: the kernel of the whole decoder does."""

    name = "decoder_forward"

    def plan(
        self, spans: Sequence[Span], *, page_size: int, windows: Sequence[int], device: torch.device
    ) -> SpanTables:
        step = Spans.of(spans, page_size)
        width = step.most_pages
        first_row_B = step.num_tokens_B.cumsum() - step.num_tokens_B
        first_page_B = np.arange(len(step)) * width
        columns = (first_row_B, step.num_tokens_B, step.num_keys_B, first_page_B, step.num_wanted_B)
        return SpanTables(np.stack(columns, axis=1).astype(np.int32), step.page_table(width).ravel())

    def run(self, plan: SpanTables, q_TNH: torch.Tensor, kv: LayerKV, spec: AttentionSpec) -> torch.Tensor:
        raise KernelError("layers of a model that is computed as a whole do not attend one by one")
