"""Lockstep's scores of known tokens: steps of the engine's own executor, over plans written here.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from lockstep.config import gather
from lockstep.config.components import ENGINE_OPTIONS
from lockstep.core.sampling import SamplingParams
from lockstep.core.step import SequenceStart, StepPlan, TokenSlice
from lockstep.engine.assembly import Engine
from lockstep.executor.fused import FusedDecoder
from lockstep.models.llm.decoder import DecoderModel

# Every row of the prompt is scored, so that the head sees all of them; the sampled token is not looked at.
_SCORE_EVERY_ROW = SamplingParams(temperature=0.0, prompt_logprobs=0)


class LockstepScorer:
    """`options` are those of LLM."""

    def __init__(self, file: str, threads: int, **options: Any) -> None:
        given = {"model": file, "threads": threads, **options}
        self._engine = Engine(gather(given, allowed=ENGINE_OPTIONS))
        self._head = _HeadWatch()
        self._steps = itertools.count()

    def scores(self, window: Sequence[int], chunk: int) -> Iterator[np.ndarray]:
        """See Scorer."""
        page_size = self._engine.opened.config.cache.page_size
        num_tokens = len(window)
        pages = iter(range(-(-num_tokens // page_size)))
        started: tuple[SequenceStart, ...] = (
            SequenceStart(0, _SCORE_EVERY_ROW, tuple(window), num_tokens, 0, ()),
        )
        for start in range(0, num_tokens, chunk):
            end = min(start + chunk, num_tokens)
            num_new_pages = -(-end // page_size) - -(-start // page_size)
            new_pages = tuple(itertools.islice(pages, num_new_pages))
            piece = TokenSlice(0, start, end - start, new_pages, samples=end == num_tokens)
            self._execute(StepPlan(next(self._steps), started, (), (piece,)))
            started = ()
            yield self._head.take(end - start)
        self._execute(StepPlan(next(self._steps), ended=(0,)))

    def _execute(self, plan: StepPlan) -> None:
        self._engine.rank.core.executor.execute(plan)


class _HeadWatch:
    """Keeps what the models' heads give, from when it is made. A probe would not do: it switches fused kernels off."""

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []
        for kind in (DecoderModel, FusedDecoder):
            self._watch(kind)

    def take(self, num_rows: int) -> np.ndarray:
        """The scores [R, V] kept since the last call. Raises RuntimeError when they are not as many."""
        scores_RV = torch.cat(self._kept).float().numpy()
        self._kept.clear()
        if len(scores_RV) != num_rows:
            raise RuntimeError(f"the head scored {len(scores_RV)} rows of a step of {num_rows}")
        return scores_RV

    def _watch(self, kind: type[DecoderModel]) -> None:
        compute = kind.logits

        def logits(model: DecoderModel, hidden_RD: torch.Tensor) -> torch.Tensor:
            scores_RV = compute(model, hidden_RD)
            self._kept.append(scores_RV.clone())  # The sampler edits them in place.
            return scores_RV

        kind.logits = logits  # type: ignore[assignment,method-assign]
