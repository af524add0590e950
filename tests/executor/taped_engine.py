"""A runner over a tiny model with hand-made plans, whose graphs are tapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tape_graph import TapeGraph, TapeSelector, tape_attention
from tiny_models import CONTEXT_LENGTH, LAYOUTS, PAGE_SIZE, Layout, SeededWeights

from lockstep.core.sampling import SamplingParams
from lockstep.core.step import SequenceStart, StepPlan, TokenSlice
from lockstep.executor.graphs import DecodeGraphs, GraphMemory, Recipe, StepGraphs
from lockstep.executor.inputs import LastTokens
from lockstep.executor.pieces import PiecedSteps
from lockstep.executor.runner import ModelRunner
from lockstep.executor.sampler import STOCK, SamplingKernels
from lockstep.executor.transfers import Transfers
from lockstep.kv.pool.pool import KVPool
from lockstep.layers.build import Build
from lockstep.models.registry import model_class
from lockstep.parallel.mesh import Mesh
from lockstep.platforms.registry import load_platform

HOST = torch.device("cpu")
MOST_ROWS = 6
MOST_PIECED_ROWS = 40
PARAMS = SamplingParams(temperature=0.0, logprobs=2, seed=0, ignore_eos=True)


class Engine:
    """`graphs` hold single tokens as a whole, `pieces` everything; the runner uses the ones that are wanted.

    With `shares`, there is a kernel for keys that sequences share; `fresh` is one for heads as their product left them.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        with_graphs: bool = False,
        with_pieces: bool = False,
        shares: bool = False,
        fresh: Callable[..., None] | None = None,
        sampling: SamplingKernels = STOCK,
        wants_all: bool = False,
    ) -> None:
        platform = load_platform("cpu")
        self.selector = TapeSelector(platform.capabilities(), ("torch",), only=True)
        self.build = Build(
            Mesh.solo(),
            HOST,
            torch.float32,
            torch.float32,
            SeededWeights(),
            self.selector,
            CONTEXT_LENGTH,
            PAGE_SIZE,
        )
        with torch.inference_mode():
            self.model = model_class(layout.config).make(self.build, layout.config)
        self.pool = KVPool(
            tuple(self.build.kv_layers),
            num_pages=64,
            page_size=PAGE_SIZE,
            dtype=torch.float32,
            allocate=lambda shape, dtype: torch.zeros(shape, dtype=dtype),
        )
        self.made: list[TapeGraph] = []
        attention = tape_attention(shares=shares, fresh=fresh)
        last_tokens = LastTokens(MOST_ROWS + 1, HOST)
        memory = GraphMemory(self._new_graph)
        self.recipe = Recipe(
            self.model,
            attention,
            self.pool,
            last_tokens,
            sampling,
            num_pages=CONTEXT_LENGTH // PAGE_SIZE,
            device=HOST,
            new_graph=memory.new,
        )
        self.graphs = DecodeGraphs(self.recipe, most_rows=MOST_ROWS)
        self.pieces = PiecedSteps(
            self.model.forward,
            attention,
            self.pool,
            last_tokens,
            most_rows=MOST_PIECED_ROWS,
            most_sequences=MOST_ROWS + 1,
            windows=self.build.windows,
            device=HOST,
            new_graph=memory.new,
        )
        self.attention = attention
        whole, pieces = self.graphs if with_graphs else None, self.pieces if with_pieces else None
        self.recorded = StepGraphs(last_tokens, whole, pieces) if whole or pieces else None
        self.runner = ModelRunner(
            self.model,
            self.pool,
            attention,
            max_sequences=MOST_ROWS + 1,
            windows=self.build.windows,
            eos_token_ids=(),
            transfers=Transfers(HOST),
            sampling=sampling,
            graphs=self.recorded,
            wants_all=wants_all,
        )

    def _new_graph(self, beside: Any) -> TapeGraph:
        self.made.append(TapeGraph(beside))
        return self.made[-1]


def decode_plan(step_id: int, lengths: dict[int, int], ended: Sequence[int] = ()) -> StepPlan:
    """One more token for each sequence, whose pages are 8 s .. 8 s + 7."""
    slices = tuple(
        TokenSlice(seq_id, at, 1, (8 * seq_id + at // PAGE_SIZE,) if at % PAGE_SIZE == 0 else (), True)
        for seq_id, at in lengths.items()
    )
    return StepPlan(step_id, (), tuple(ended), slices)


def plans(
    prompts: dict[int, int], shrinking: Sequence[int], num_steps: int, params: SamplingParams = PARAMS
) -> list[StepPlan]:
    """Prompts of these lengths, then steps of single tokens; `shrinking` leave one after the other."""
    started, slices = [], []
    for seq_id, length in prompts.items():
        tokens = tuple((7 * seq_id + 3 * at) % 90 for at in range(length))
        started.append(SequenceStart(seq_id, params, tokens, length, 0, ()))
        pages = tuple(8 * seq_id + page for page in range(-(-length // PAGE_SIZE)))
        slices.append(TokenSlice(seq_id, 0, length, pages, True))
    made = [StepPlan(0, tuple(started), (), tuple(slices))]
    lengths, leaving = dict(prompts), list(shrinking)
    for step in range(num_steps):
        ended = [leaving.pop(0)] if leaving and step % 2 else []
        for seq_id in ended:
            del lengths[seq_id]
        made.append(decode_plan(step + 1, lengths, ended))
        lengths = {seq_id: length + 1 for seq_id, length in lengths.items()}
    return made


def layout_named(name: str) -> Layout:
    return next(layout for layout in LAYOUTS if layout.name == name)
