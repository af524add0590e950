"""Logits of known tokens, from transformers and from the engine's executor, row by row.

Shapes: T tokens of one sequence, R rows, V vocabulary.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

from lockstep.core.probe import ProbePoint
from lockstep.core.sampling import SamplingParams
from lockstep.core.step import SequenceStart, StepPlan, TokenSlice
from lockstep.engine.build import build_rank
from lockstep.engine.opening import open_for_running
from lockstep.executor import logprobs, runner
from lockstep.executor.runner import ModelRunner
from lockstep.parallel.mesh import Mesh
from lockstep.tokenizer.tokenizer import Tokenizer

PAGE_SIZE = 4
# What follows every row is asked for, so that all are scored; the tokens that are sampled are not looked at.
SCORE_EVERY_ROW = SamplingParams(temperature=0.0, prompt_logprobs=0, logprobs=0)


class HeadProbe:
    """Keeps scores of rows, in program order: what the language-model head gives where a build has this probe."""

    def __init__(self) -> None:
        self._logits: list[torch.Tensor] = []

    def wants(self, point: ProbePoint) -> bool:
        return point.axes == ("row", "vocab")

    def record(self, point: ProbePoint, value: torch.Tensor) -> None:
        self.keep(value)

    def keep(self, logits_RV: torch.Tensor) -> None:
        self._logits.append(logits_RV.clone())

    def begin_step(self, step_id: int, rows: tuple[tuple[int, int], ...]) -> None:
        self._logits = []

    def rows(self) -> torch.Tensor:
        """Logits [R, V] of the last step, in float32 on the host."""
        return torch.cat(self._logits).float().cpu()


class TeacherForcedEngine:
    """One rank as the engine builds it, driven by plans of our own over known tokens.

    `changed` overrides settings of the model's config.json, to make a model that is wrong on purpose; `options` are the
    engine's own. A model that is `probed` tells its head's scores, and runs layer by layer, without graphs. Otherwise
    it is as users have it, and scores are read where their log-probabilities are taken.
    """

    def __init__(
        self,
        path: Path,
        *,
        dtype: str = "float32",
        changed: dict[str, Any] | None = None,
        probed: bool = True,
        **options: Any,
    ) -> None:
        settings: dict[str, Any] = {"page_size": PAGE_SIZE, "max_total_tokens": 1024, "threads": 1}
        opened = open_for_running({"model": str(path), "dtype": dtype, **settings, **options})
        self._page_size = opened.config.cache.page_size
        self._head = HeadProbe()
        self._reads_scores = nullcontext if probed else partial(reading_scores, self._head.keep)
        # No text is read or written here, so a model without a tokenizer will do.
        self.rank = build_rank(
            replace(opened.files, config={**opened.files.config, **(changed or {})}),
            opened.facts,
            opened.config,
            opened.platform,
            cast(Tokenizer, None),
            Mesh(),
            probe=self._head if probed else None,
        )
        assert isinstance(self.rank.core.executor, ModelRunner)
        self.runner = self.rank.core.executor

    def logits(
        self, sequences: Sequence[Sequence[int]], *, num_prompt_tokens: Sequence[int], chunk: int
    ) -> list[torch.Tensor]:
        """Logits [T, V] of each sequence, computed together: prompts in chunks, the rest one token a step.

        One sequence joins at each step, so that chunks and single tokens meet in a batch. Pages are handed out
        in a shuffled order, as needed, so that no sequence lies in one piece.
        """
        free_pages = list(range(self.rank.num_pages))
        random.Random(7).shuffle(free_pages)
        num_done = [0] * len(sequences)
        found: list[list[torch.Tensor]] = [[] for _ in sequences]
        for step in range(len(sequences) + max(map(len, sequences))):
            started, slices = [], []
            for seq_id, tokens in enumerate(sequences[: step + 1]):
                start, num_prompt = num_done[seq_id], num_prompt_tokens[seq_id]
                if start == len(tokens):
                    continue
                if start == 0:
                    started.append(SequenceStart(seq_id, SCORE_EVERY_ROW, tuple(tokens), num_prompt, 0, ()))
                num_tokens = min(chunk, num_prompt - start) if start < num_prompt else 1
                end = num_done[seq_id] = start + num_tokens
                num_new_pages = self._num_pages(end) - self._num_pages(start)
                pages = tuple(free_pages.pop() for _ in range(num_new_pages))
                slices.append(TokenSlice(seq_id, start, num_tokens, pages, samples=end >= num_prompt))
            if slices:
                self._run(StepPlan(step, tuple(started), (), tuple(slices)), found)
        self.runner.execute(StepPlan(-1, ended=tuple(range(len(sequences)))))
        return [torch.cat(rows) for rows in found]

    def _run(self, plan: StepPlan, found: list[list[torch.Tensor]]) -> None:
        """Gives each sequence its rows: first those scored as prompt, slice by slice, then the sampled ones."""
        self._head.begin_step(plan.step_id, ())
        with self._reads_scores():
            self.runner.execute(plan)
        scored = [(piece.seq_id, piece.num_tokens - piece.samples) for piece in plan.slices]
        sampled = [(piece.seq_id, 1) for piece in plan.slices if piece.samples]
        owners = [owner for owner in (*scored, *sampled) if owner[1]]
        parts = self._head.rows().split([num_rows for _, num_rows in owners])
        for (seq_id, _), logits_RV in zip(owners, parts, strict=True):
            found[seq_id].append(logits_RV)

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)


@contextmanager
def reading_scores(keep: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Hands the scores of every row to `keep` when the executor takes their log-probabilities."""
    score_tokens = logprobs.score_tokens

    def read(logits_RV: torch.Tensor, *rest: Any) -> logprobs.ScoredTokens:
        keep(logits_RV)
        return score_tokens(logits_RV, *rest)

    # Prompts' rows pass there, sampled ones here.
    with patch.object(logprobs, "score_tokens", read), patch.object(runner, "score_tokens", read):
        yield


def with_weights_in(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model itself, its weights alone in this dtype: rotary frequencies stay in float32, as in one that is loaded.

    `model.to(dtype)` would round those too, for good, and angles would be off by more the later a position is.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def transformers_logits(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], **keywords: Any
) -> list[torch.Tensor]:
    """Logits [T, V] of transformers, each sequence in one forward of its own, attention written out.

    `keywords` reach transformers' attention function.
    """
    model.set_attn_implementation("eager")
    return [model(torch.tensor([list(tokens)]), **keywords).logits[0].float() for tokens in sequences]


def random_sequences(vocab_size: int, lengths: Sequence[int], seed: int = 3) -> list[list[int]]:
    """Random token ids, one list for each length."""
    print(f"seed {seed}")
    chooser = random.Random(seed)
    return [[chooser.randrange(vocab_size) for _ in range(length)] for length in lengths]


def largest_difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest absolute difference of two lists of tensors; infinite where one is not a number."""
    gaps = [
        (one - other).abs().nan_to_num(nan=torch.inf).max().item() for one, other in _pairs(found, expected)
    ]
    return max(gaps)


def root_mean_square(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The root mean square of all differences of two lists of tensors."""
    return (
        torch.cat([(one - other).flatten() for one, other in _pairs(found, expected)])
        .square()
        .mean()
        .sqrt()
        .item()
    )


def _pairs(
    found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    pairs = list(zip(found, expected, strict=True))
    assert pairs and all(one.shape == other.shape for one, other in pairs)
    return pairs


def rewrite_config(directory: Path, **changed: Any) -> Path:
    """Changes settings of a saved config.json; None removes one."""
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changed}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return directory
