"""Steps of single tokens as device graphs: recorded once for each of a few sizes, then submitted as a whole.

A graph reads and writes the same memory each time, so a step's rows and page tables are copied there first. Rows that
the graph has and the step has not are padding: tokens that are stored nowhere and see no keys. A graph holds what the
model's forward submitted when it was recorded: the kernels that were bound when the model was built, and no others.
Shapes: T rows, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from lockstep.attention.backend import AttentionBackend
from lockstep.attention.paged_backend import PagedBackend
from lockstep.core.step import StepPlan
from lockstep.executor.inputs import LastTokens, StepInputs, StepRows, padding_rows
from lockstep.executor.pieces import Forward, PiecedSteps
from lockstep.kv.pool.pool import KVPool
from lockstep.layers.build import ForwardContext
from lockstep.ops.selection import Binding
from lockstep.platforms.base import DeviceGraph

NewGraph = Callable[[DeviceGraph | None], DeviceGraph]
"""Makes a graph in the memory of another."""

_NOT_ASKED = ("attention_decode", "attention_extend", "argmax", "top_k_top_p_sample", "decoder_forward")
"""Operators outside of a step of single tokens that runs layer by layer, and those that the backend answers for."""

SMALLEST = 8
"""Up to this many rows, graphs are recorded at start."""


def ladder(most_rows: int) -> tuple[int, ...]:
    """The sizes that graphs are recorded for, up to `most_rows`: few, and close enough that padding wastes little.

    1, 2, 4 and 8 rows, then steps of 8 up to 64 and of 16 beyond.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, most_rows, 16)]
    return (*(size for size in sizes if size < most_rows), most_rows)


def why_no_pieces(bindings: Iterable[Binding]) -> str | None:
    """The reason why what these kernels compute between a step's attention cannot be recorded; None when it can."""
    for binding in bindings:
        if binding.op == "decoder_forward":
            return f"{binding.op}.{binding.kernel.provider} computes steps as a whole"
        if binding.kernel.asks_host and binding.op not in _NOT_ASKED:
            return f"{binding.op}.{binding.kernel.provider} reads values on the host"
    return None


def why_no_graphs(bindings: Iterable[Binding], attention: AttentionBackend) -> str | None:
    """The reason why a step of single tokens over these kernels cannot be recorded whole; None when it can."""
    reason = why_no_pieces(bindings)
    if reason is not None:
        return reason
    if not isinstance(attention, PagedBackend):
        return f"attention by {attention.name} is planned anew for each step"
    return attention.why_no_graphs


class RecordedStep:
    """A step of `num_rows` single tokens in memory of its own: filled, then computed, as often as wanted."""

    def __init__(
        self,
        num_rows: int,
        forward: Forward,
        attention: PagedBackend,
        pool: KVPool,
        last_tokens: LastTokens,
        *,
        num_pages: int,
        device: torch.device,
        graph: DeviceGraph,
    ) -> None:
        self.num_rows = num_rows
        self._graph = graph
        self._forward = forward
        self._attention = attention
        self._last_tokens = last_tokens
        self._plan = attention.fixed_plan(
            num_rows=num_rows, num_pages=num_pages, page_size=pool.page_size, device=device
        )
        self.rows = padding_rows(num_rows, device)
        self._context = ForwardContext(self.rows.positions_T, self.rows.slots_T, attention, self._plan, pool)
        # Run once before: kernels are compiled and libraries make their handles, which no graph may hold.
        self.run()
        with graph.capture():
            self._hidden_TD = self.run()

    def fill(self, inputs: StepInputs) -> None:
        """Copies a step of `num_rows` rows, padding included, to where the graph reads it."""
        self.rows.facts_5T.copy_(inputs.spans.stage(inputs.facts_5T), non_blocking=True)
        self._attention.refill(self._plan, inputs.spans)

    def run(self) -> torch.Tensor:
        """Hidden rows [T, D] of what was filled in, without the graph."""
        return self._forward(self._context, self._last_tokens.resolve(self.rows))

    def replay(self) -> torch.Tensor:
        """Hidden rows [T, D] of what was filled in, by the graph; valid until its next replay."""
        self._graph.replay()
        return self._hidden_TD


class DecodeGraphs:
    """Graphs for steps of up to `most_rows` single tokens, each recorded when its size is first wanted.

    `num_pages` is the most that a sequence can have.
    Tokens that the host does not know yet are taken from `last_tokens` by the graph itself.
    """

    def __init__(
        self,
        forward: Forward,
        attention: PagedBackend,
        pool: KVPool,
        last_tokens: LastTokens,
        *,
        most_rows: int,
        num_pages: int,
        device: torch.device,
        new_graph: Callable[[], DeviceGraph],
    ) -> None:
        self._forward = forward
        self._attention = attention
        self._pool = pool
        self._last_tokens = last_tokens
        self._num_pages = num_pages
        self._device = device
        self._new_graph = new_graph
        self.sizes = ladder(most_rows)
        self._recorded: dict[int, RecordedStep] = {}

    def num_rows_for(self, plan: StepPlan) -> int | None:
        """Rows of the smallest graph that can hold the plan, or None when none can."""
        if any(piece.num_tokens != 1 for piece in plan.slices):
            return None
        return next((size for size in self.sizes if size >= len(plan.slices)), None)

    def holds(self, inputs: StepInputs) -> bool:
        """True for a step that was padded to one of the sizes."""
        return inputs.facts_5T.shape[1] in self.sizes and inputs.num_rows == len(inputs.spans)

    def compute(self, inputs: StepInputs) -> tuple[StepRows, torch.Tensor]:
        """The rows and hidden rows [T, D] of a step that was padded to one of the sizes, padding left out of these."""
        step = self.step(inputs.facts_5T.shape[1])
        step.fill(inputs)
        return step.rows, step.replay()[: len(inputs.spans)]

    def record_smallest(self) -> None:
        """Records the sizes that nearly every use wants, so that no request waits for them."""
        for size in self.sizes:
            if size <= SMALLEST:
                self.step(size)

    @property
    def missing(self) -> list[int]:
        """Sizes that are not recorded yet."""
        return [size for size in self.sizes if size not in self._recorded]

    def step(self, num_rows: int) -> RecordedStep:
        """The recorded step of one of the sizes."""
        if num_rows not in self._recorded:
            self._recorded[num_rows] = RecordedStep(
                num_rows,
                self._forward,
                self._attention,
                self._pool,
                self._last_tokens,
                num_pages=self._num_pages,
                device=self._device,
                graph=self._new_graph(),
            )
        return self._recorded[num_rows]


class GraphMemory:
    """Makes graphs that share one memory, since only one of them runs at a time."""

    def __init__(self, new_graph: NewGraph) -> None:
        self._new_graph = new_graph
        self._first: DeviceGraph | None = None

    def new(self) -> DeviceGraph:
        graph = self._new_graph(self._first)
        if self._first is None:
            self._first = graph
        return graph


class StepGraphs:
    """The recorded steps of a runner: those of single tokens whole, others in pieces, where there are such.

    All of them share `last_tokens`, from which they take tokens that the host does not know yet.
    """

    def __init__(self, last_tokens: LastTokens, whole: DecodeGraphs | None, pieces: PiecedSteps | None) -> None:
        self.last_tokens = last_tokens
        self._whole = whole
        self._pieces = pieces

    def num_rows_for(self, plan: StepPlan) -> int | None:
        """Rows of the smallest recorded step that can hold the plan, or None when none can."""
        for steps in (self._whole, self._pieces):
            num_rows = steps.num_rows_for(plan) if steps is not None else None
            if num_rows is not None:
                return num_rows
        return None

    def compute(self, inputs: StepInputs) -> tuple[StepRows, torch.Tensor]:
        """The rows and hidden rows [T, D] of a step padded to `num_rows_for`, padding left out of these."""
        is_whole = self._whole is not None and self._whole.holds(inputs)
        steps = self._whole if is_whole else self._pieces
        assert steps is not None, "only steps that a graph can hold are padded"
        return steps.compute(inputs)

    def record_smallest(self) -> None:
        """Records the steps of single tokens that nearly every use wants, so that no request waits for them."""
        if self._whole is not None:
            self._whole.record_smallest()

    def record_next(self) -> bool:
        """Records the smallest step that is not recorded yet; False when all are."""
        missing = [(size, steps) for steps in (self._whole, self._pieces) if steps for size in steps.missing]
        if missing:
            size, steps = min(missing, key=lambda each: each[0])
            steps.step(size)
        return bool(missing)

    def record_largest(self) -> None:
        """Records the largest step of each kind."""
        for steps in (self._whole, self._pieces):
            if steps is not None:
                steps.step(steps.sizes[-1])
