"""The plan of a step for kernels that compute whole decoders: they attend themselves, and need only who owns what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lockstep.attention.backend import AttentionBackend, AttentionSpec, Span
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
        rows: list[tuple[int, ...]] = []
        pages: list[int] = []
        row = 0
        for span in spans:
            num_wanted = span.num_tokens if span.num_wanted is None else span.num_wanted
            rows.append((row, span.num_tokens, span.num_kv_tokens, len(pages), num_wanted))
            pages.extend(span.page_ids[: -(-span.num_kv_tokens // page_size)])
            row += span.num_tokens
        return SpanTables(np.array(rows, dtype=np.int32), np.array(pages, dtype=np.int32))

    def run(self, plan: SpanTables, q_TNH: torch.Tensor, kv: LayerKV, spec: AttentionSpec) -> torch.Tensor:
        raise KernelError("layers of a model that is computed as a whole do not attend one by one")
