"""Steps as device graphs in pieces, cut at the attention of each layer, which runs as it was planned for the step.

What comes between two layers' attention takes the same memory and the same kernels in each step of so many rows, and is
most of what the host submits. Attention depends on who owns the rows, and its libraries plan that on the host. Rows
that the pieces have and the step has not are padding. Pieces of many rows end with those that sample alone: as many as
there can be sequences. Shapes: T rows, R rows whose hidden state is read, D model, N heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lockstep.attention.backend import AttentionBackend, AttentionSpec, Span
from lockstep.core.errors import KernelError
from lockstep.core.step import StepPlan
from lockstep.executor.computed import Computed
from lockstep.executor.inputs import LastTokens, StepInputs, padding_rows, pays_to_select
from lockstep.kv.pool.pool import KVPool, LayerKV
from lockstep.layers.build import ForwardContext
from lockstep.layers.tokens import Tokens
from lockstep.platforms.base import DeviceGraph

Forward = Callable[[ForwardContext, Tokens], torch.Tensor]

_FINEST = 16
_FEWEST, _MOST = 2048, 8192
_SUBMITTED_MEANWHILE = 1.2e13


def most_pieced_rows(weight_bytes: int) -> int:
    """Larger steps compute for longer than the host takes to submit them kernel by kernel.

    On an H100 a layer's kernels take the host about 1 ms; 0.6 billion parameters in 16 bits then come to 10,000 rows.
    Of a mixture only some weights count, and memory is cheap up to _FEWEST rows.
    """
    return min(_MOST, max(_FEWEST, int(_SUBMITTED_MEANWHILE / max(1, weight_bytes))))


def piece_sizes(most_rows: int) -> tuple[int, ...]:
    """The sizes that pieces are recorded for, up to `most_rows`: eight for each doubling, at least 16 rows apart.

    So that padding is at most an eighth of a step of more than 128 rows.
    """
    sizes, size = [], _FINEST
    while size < most_rows:
        sizes.append(size)
        size += max(_FINEST, (1 << (size.bit_length() - 1)) // 8)
    return (*sizes, most_rows)


class _Standing(AttentionBackend):
    """In the place of attention where only the layers around it count."""

    def plan(
        self, spans: Sequence[Span], *, page_size: int, windows: Sequence[int], device: torch.device
    ) -> Any:
        raise KernelError(f"{self.name} attends to nothing, so that no step can be planned for it")


class _Absent(_Standing):
    """Attention to nothing."""

    name = "absent"

    def run(self, plan: Any, q_TNH: torch.Tensor, kv: LayerKV, spec: AttentionSpec) -> torch.Tensor:
        return torch.zeros_like(q_TNH)


@dataclass(frozen=True, slots=True)
class _Attending:
    """A layer's attention between two pieces: where the first left its queries and the second looks for the result."""

    q_TNH: torch.Tensor
    kv: LayerKV
    spec: AttentionSpec
    out_TNH: torch.Tensor


class _Cutter(_Standing):
    """Records what a model submits while it is entered; each layer's attention ends a piece and begins the next."""

    name = "cut"

    def __init__(self, new_graph: Callable[[], DeviceGraph]) -> None:
        self.pieces: list[DeviceGraph] = []
        self.attending: list[_Attending] = []
        self._new_graph = new_graph
        self._recording = ExitStack()

    def __enter__(self) -> _Cutter:
        self._begin()
        return self

    def __exit__(self, *error: object) -> None:
        self._recording.close()

    def run(self, plan: Any, q_TNH: torch.Tensor, kv: LayerKV, spec: AttentionSpec) -> torch.Tensor:
        self._recording.close()
        piece = self.pieces[-1]
        self._begin()
        # Queries are alive here, so that the result lies elsewhere. Once recorded, both may be written over by pieces
        # after those that need them, in this step and in steps of other sizes.
        out_TNH = torch.empty_like(q_TNH)
        self.attending.append(_Attending(piece.place(q_TNH), kv, spec, piece.place(out_TNH)))
        return out_TNH

    def _begin(self) -> None:
        self.pieces.append(self._new_graph())
        self._recording.enter_context(self.pieces[-1].capture())


class PiecedStep:
    """A step of `num_rows` rows in memory of its own: filled, then computed, as often as wanted.

    It gives the hidden states of all rows, or with `most_wanted` those of so many that each filling names. The first
    time it is computed kernel by kernel, and recorded when it comes again: recording takes several times as long.
    """

    def __init__(
        self,
        num_rows: int,
        most_wanted: int | None,
        forward: Forward,
        pool: KVPool,
        last_tokens: LastTokens,
        *,
        device: torch.device,
        new_graph: Callable[[], DeviceGraph],
    ) -> None:
        self.rows = padding_rows(num_rows, device)
        self.wanted_R: torch.Tensor | None = None
        if most_wanted is not None:
            self.wanted_R = torch.zeros(most_wanted, dtype=torch.int64, device=device)
        self._forward = forward
        self._pool = pool
        self._last_tokens = last_tokens
        self._new_graph = new_graph
        self._has_run = False
        self._pieces: list[DeviceGraph] = []
        self._attending: list[_Attending] = []
        self._hidden_RD: torch.Tensor | None = None

    @property
    def is_recorded(self) -> bool:
        """True once there are pieces to replay."""
        return self._hidden_RD is not None

    def record(self) -> None:
        """Makes the pieces, if there are none yet."""
        if self.is_recorded:
            return
        if not self._has_run:
            # Once before: kernels are compiled and libraries make their handles, which no graph may hold.
            self.run(_Absent(), None)
        with _Cutter(self._new_graph) as cutter:
            hidden_RD = self.run(cutter, None)
        self._pieces, self._attending = cutter.pieces, cutter.attending
        self._hidden_RD = self._pieces[-1].place(hidden_RD)

    def compute(self, attention: AttentionBackend, plan: Any) -> torch.Tensor:
        """Hidden rows [R, D] of what was filled in; valid until the next replay of any graph."""
        if not self.is_recorded and not self._has_run:
            return self.run(attention, plan)
        self.record()
        return self.replay(attention, plan)

    def fill(self, inputs: StepInputs) -> None:
        """Copies a step of `num_rows` rows, padding included, and the rows wanted of it to where pieces read them."""
        self.rows.fill(inputs)
        if self.wanted_R is not None:
            wanted_row_R = inputs.wanted_row_R
            assert wanted_row_R is not None, "these pieces leave rows out, and the step wants all"
            padded_row_R = np.zeros(len(self.wanted_R), dtype=np.int64)
            padded_row_R[: len(wanted_row_R)] = wanted_row_R
            inputs.spans.stager.fill(self.wanted_R, padded_row_R)

    def run(self, attention: AttentionBackend, plan: Any) -> torch.Tensor:
        """Hidden rows [R, D] of what was filled in, without graphs."""
        self._has_run = True
        rows = self.rows
        context = ForwardContext(rows.positions_T, rows.slots_T, attention, plan, self._pool, self.wanted_R)
        return self._forward(context, self._last_tokens.of(rows))

    def replay(self, attention: AttentionBackend, plan: Any) -> torch.Tensor:
        """Hidden rows [R, D] of what was filled in, by the pieces, which are there."""
        assert self._hidden_RD is not None, "a step is recorded before it is replayed"
        first, *others = self._pieces
        first.replay()
        for at, piece in zip(self._attending, others, strict=True):
            attention.run_into(plan, at.q_TNH, at.kv, at.spec, at.out_TNH)
            piece.replay()
        return self._hidden_RD


class PiecedSteps:
    """Pieces for steps of up to `most_rows` rows, each size recorded when it is wanted for the second time.

    Of sizes that are large beside `most_sequences`, pieces compute only rows that sample to the end; they are recorded
    once more when all rows of a step are first wanted.
    `takes_single`: steps of single tokens are computed so; `takes_longer`: those with longer spans are.
    """

    def __init__(
        self,
        forward: Forward,
        attention: AttentionBackend,
        pool: KVPool,
        last_tokens: LastTokens,
        *,
        most_rows: int,
        most_sequences: int,
        windows: Sequence[int],
        device: torch.device,
        new_graph: Callable[[], DeviceGraph],
        takes_single: bool = True,
        takes_longer: bool = True,
    ) -> None:
        self._takes = {True: takes_single, False: takes_longer}
        self._forward = forward
        self._attention = attention
        self._pool = pool
        self._last_tokens = last_tokens
        self._most_sequences = most_sequences
        self._windows = tuple(windows)
        self._device = device
        self._new_graph = new_graph
        self._steps: dict[tuple[int, int | None], PiecedStep] = {}
        self.sizes = piece_sizes(most_rows)

    def num_rows_for(self, plan: StepPlan) -> int | None:
        """Rows of the smallest size that can hold the plan, or None when none can."""
        num_rows = sum(piece.num_tokens for piece in plan.slices)
        if not self._takes[num_rows == len(plan.slices)]:
            return None
        return next((size for size in self.sizes if size >= num_rows), None)

    def compute(self, inputs: StepInputs) -> Computed:
        """A step that was padded to one of the sizes."""
        step = self.step(inputs.facts_5T.shape[1], wants_all=inputs.wanted_row_R is None)
        step.fill(inputs)
        plan = self._attention.plan(
            inputs.spans, page_size=self._pool.page_size, windows=self._windows, device=self._device
        )
        return Computed(step.rows, step.compute(self._attention, plan), wanted_R=step.wanted_R)

    @property
    def missing(self) -> list[int]:
        """Sizes that are not recorded yet as most steps want them."""
        keys = {size: (size, self._most_wanted(size)) for size in self.sizes}
        there = {key for key, step in self._steps.items() if step.is_recorded}
        return [size for size, key in keys.items() if key not in there]

    def record(self, num_rows: int, *, wants_all: bool = False) -> None:
        """Records one of the sizes, if it is not yet."""
        self.step(num_rows, wants_all=wants_all).record()

    def step(self, num_rows: int, *, wants_all: bool = False) -> PiecedStep:
        """The step of one of the sizes."""
        key = num_rows, None if wants_all else self._most_wanted(num_rows)
        if key not in self._steps:
            self._steps[key] = PiecedStep(
                *key,
                self._forward,
                self._pool,
                self._last_tokens,
                device=self._device,
                new_graph=self._new_graph,
            )
        return self._steps[key]

    def _most_wanted(self, num_rows: int) -> int | None:
        """The most rows of such a size that are wanted where none is but those that sample; None to compute all."""
        return self._most_sequences if pays_to_select(self._most_sequences, num_rows) else None
