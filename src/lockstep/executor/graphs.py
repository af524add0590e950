"""Steps of single tokens as device graphs: recorded once for each of a few sizes, then submitted as a whole.

A graph reads and writes the same memory each time, so a step's rows and page tables are copied there first. Rows that
the graph has and the step has not are padding: tokens that are stored nowhere and see no keys. A graph holds what the
model submitted when it was recorded: the kernels that were bound when it was built, and no others. It ends with the
hidden state of every row. Of two small ones the second chooses the best token of each: it is replayed when nobody wants
anything else, and the first, which gives scores, when somebody does.
Shapes: T rows, D model, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from lockstep.attention.backend import AttentionBackend
from lockstep.attention.paged_backend import PagedBackend
from lockstep.core.step import StepPlan
from lockstep.executor.computed import Computed, RecordedEnd
from lockstep.executor.inputs import LastTokens, StepInputs, padding_rows
from lockstep.executor.pieces import PiecedSteps
from lockstep.executor.sampler import Chosen, SamplingKernels
from lockstep.kv.pool.pool import KVPool
from lockstep.layers.build import ForwardContext
from lockstep.models.llm.decoder import DecoderModel
from lockstep.ops.selection import Binding
from lockstep.platforms.base import DeviceGraph

NewGraph = Callable[[DeviceGraph | None], DeviceGraph]
"""Makes a graph in the memory of another."""

_NOT_ASKED = (
    "attention_decode",
    "attention_decode_shared",
    "attention_extend",
    "norm_rope_attention_decode",
    "argmax",
    "choose_greedy",
    "linear_choose_greedy",
    "copy_words",
    "top_k_top_p_sample",
    "decoder_decode",
    "decoder_forward",
)
"""Operators without which a step of single tokens can be recorded, and those that the backend answers for."""

SMALLEST = 8
"""Up to this many rows, graphs are recorded at start; so is the largest."""


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


def why_no_choice(bindings: Iterable[Binding]) -> str | None:
    """The reason why the greedy choice after such a step cannot be recorded; None when it can."""
    asking = (each for each in bindings if each.op == "argmax" and each.kernel.asks_host)
    return next((f"argmax.{each.kernel.provider} reads values on the host" for each in asking), None)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What steps of single tokens are recorded from. `num_pages` is the most that a sequence can have.

    Tokens that the host does not know yet are taken from `last_tokens` by the graphs themselves.
    """

    model: DecoderModel
    attention: PagedBackend
    pool: KVPool
    last_tokens: LastTokens
    sampling: SamplingKernels
    num_pages: int
    device: torch.device
    new_graph: Callable[[], DeviceGraph]


class RecordedStep:
    """A step of `num_rows` single tokens in memory of its own: filled, then computed, as often as wanted.

    With `shares`, attention reads keys that several of them have in common only once.
    """

    def __init__(self, num_rows: int, recipe: Recipe, *, shares: bool = False) -> None:
        self.rows = padding_rows(num_rows, recipe.device)
        self._recipe = recipe
        self._plan = recipe.attention.fixed_plan(
            self.rows.num_keys_T,
            num_pages=recipe.num_pages,
            page_size=recipe.pool.page_size,
            shares=shares,
        )
        self._context = ForwardContext(
            self.rows.positions_T, self.rows.slots_T, recipe.attention, self._plan, recipe.pool
        )
        # Run once before: kernels are compiled and libraries make their handles, which no graph may hold.
        has_choice = self._can_choose(self.run())
        self._graph = recipe.new_graph()
        with self._graph.capture():
            hidden_TD = self.run()
        scores = RecordedEnd(recipe.new_graph(), lambda: self.score(hidden_TD))
        choice = RecordedEnd(recipe.new_graph(), lambda: self.choose(hidden_TD)) if has_choice else None
        # Alive until here, so that neither end lies where it does. Graphs of other sizes may write over it.
        self.computed = Computed(self.rows, self._graph.place(hidden_TD), scores, choice)

    def fill(self, inputs: StepInputs) -> None:
        """Copies a step of `num_rows` rows, padding included, to where the graph reads it."""
        self.rows.fill(inputs)
        self._recipe.attention.refill(self._plan, inputs.spans)

    def run(self) -> torch.Tensor:
        """Hidden rows [T, D] of what was filled in, without the graph."""
        return self._recipe.model.forward(self._context, self._recipe.last_tokens.of(self.rows))

    def score(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Scores [T, V] of hidden rows, without the graph."""
        return self._recipe.model.logits(hidden_TD)

    def choose(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """The best token of each row, kept for the next step and packed as Chosen packs it, without the graph."""
        head, sampling, last_tokens = self._recipe.model.head, self._recipe.sampling, self._recipe.last_tokens
        if head.chooses:
            return head.choose_greedy(hidden_TD, self.rows.owners_T, last_tokens.ids_S)
        logits_TV = self.score(hidden_TD)
        if sampling.choose_greedy is not None:
            chosen_2T: torch.Tensor = sampling.choose_greedy.function(
                logits_TV, self.rows.owners_T, last_tokens.ids_S
            )
            return chosen_2T
        best_T, token_ids_T = sampling.argmax_of(logits_TV).function(logits_TV)
        last_tokens.keep_padded(self.rows.owners_T, token_ids_T)
        return Chosen(token_ids_T, best_T).packed()

    def replay(self) -> Computed:
        """What was filled in, computed by the graph; valid until the next replay of any graph."""
        self._graph.replay()
        return self.computed

    def _can_choose(self, hidden_TD: torch.Tensor) -> bool:
        """True when the choice can be recorded, once it and the scores have run."""
        sampling, logits_TV = self._recipe.sampling, self.score(hidden_TD)
        if (sampling.choose_greedy or sampling.argmax_of(logits_TV)).asks_host:
            return False
        self.choose(hidden_TD)
        return True


class DecodeGraphs:
    """Graphs for steps of up to `most_rows` single tokens, each recorded when its size is first wanted.

    Sizes are recorded once more when keys are first shared in a step of theirs.
    """

    def __init__(self, recipe: Recipe, *, most_rows: int) -> None:
        self._recipe = recipe
        self.sizes = ladder(most_rows)
        self._recorded: dict[int, RecordedStep] = {}
        self._sharing: dict[int, RecordedStep] = {}

    def num_rows_for(self, plan: StepPlan) -> int | None:
        """Rows of the smallest graph that can hold the plan, or None when none can."""
        at = bisect_left(self.sizes, len(plan.slices))
        if at == len(self.sizes) or any([piece.num_tokens != 1 for piece in plan.slices]):
            return None
        return self.sizes[at]

    def holds(self, inputs: StepInputs) -> bool:
        """True for a step that was padded to one of the sizes."""
        return inputs.facts_5T.shape[1] in self.sizes and inputs.num_rows == len(inputs.spans)

    def compute(self, inputs: StepInputs) -> Computed:
        """A step that was padded to one of the sizes."""
        num_rows = inputs.facts_5T.shape[1]
        shares = self._recipe.attention.shares_keys(inputs.spans, self._recipe.pool.page_size)
        step = self.step(num_rows, shares=shares)
        step.fill(inputs)
        return step.replay()

    def record_first(self) -> None:
        """Records the sizes that nearly every use wants, and the one that others need, so that no request waits."""
        for size in self.sizes:
            if size <= SMALLEST or size == self.sizes[-1]:
                self.step(size)

    @property
    def missing(self) -> list[int]:
        """Sizes that are not recorded yet."""
        return [size for size in self.sizes if size not in self._recorded]

    def record(self, num_rows: int) -> None:
        """Records one of the sizes, if it is not yet."""
        self.step(num_rows)

    def step(self, num_rows: int, *, shares: bool = False) -> RecordedStep:
        """The recorded step of one of the sizes."""
        recorded = self._sharing if shares else self._recorded
        if num_rows not in recorded:
            if num_rows > SMALLEST and num_rows != self.sizes[-1]:
                # The largest before others of many rows: these find room where its scores were.
                self.step(self.sizes[-1])
            recorded[num_rows] = RecordedStep(num_rows, self._recipe, shares=shares)
        return recorded[num_rows]


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

    def compute(self, inputs: StepInputs) -> Computed:
        """A step padded to `num_rows_for`."""
        is_whole = self._whole is not None and self._whole.holds(inputs)
        steps = self._whole if is_whole else self._pieces
        assert steps is not None, "only steps that a graph can hold are padded"
        return steps.compute(inputs)

    def record_first(self) -> None:
        """Records the steps of single tokens that no request is to wait for."""
        if self._whole is not None:
            self._whole.record_first()

    def record_next(self) -> bool:
        """Records the smallest step that is not recorded yet; False when all are."""
        missing = [(size, steps) for steps in (self._whole, self._pieces) if steps for size in steps.missing]
        if missing:
            size, steps = min(missing, key=lambda each: each[0])
            steps.record(size)
        return bool(missing)

    def record_largest(self) -> None:
        """Records the step of each kind that takes most memory."""
        if self._whole is not None:
            self._whole.step(self._whole.sizes[-1])
        if self._pieces is not None:
            self._pieces.record(self._pieces.sizes[-1], wants_all=True)
