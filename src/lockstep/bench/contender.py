"""Who is measured: anything that answers a batch of jobs and says when each token came."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lockstep.bench.workload import Job
from lockstep.core.output import ModelCard


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One batch, answered once. Times are seconds since the whole batch was handed over.

    `trace` holds, for each step that brought tokens, when it ended and how many output tokens there were in all.
    `first_token_s` and `first_token_ids` have one entry per job.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    num_steps: int
    seconds: float
    trace: tuple[tuple[float, int], ...]
    first_token_s: tuple[float, ...]
    first_token_ids: tuple[int, ...]
    num_cached_tokens: int = 0
    num_preemptions: int = 0

    @property
    def output_tokens_per_s(self) -> float:
        """Generated tokens over the whole time, that of the prompts included."""
        return self.num_output_tokens / self.seconds

    @property
    def total_tokens_per_s(self) -> float:
        """Prompt and generated tokens over the whole time."""
        return (self.num_prompt_tokens + self.num_output_tokens) / self.seconds

    @property
    def tokens_per_step(self) -> float:
        """Rows of an average step: prompt tokens that were computed, and generated ones."""
        computed = self.num_prompt_tokens - self.num_cached_tokens + self.num_output_tokens
        return computed / self.num_steps

    @property
    def ttft_s(self) -> float:
        """Time to the first token, median over the jobs."""
        return statistics.median(self.first_token_s)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Rate after every job had its first token; None when nothing followed."""
        followed = self._decode_trace
        if len(followed) < 2:
            return None
        return (followed[-1][1] - followed[0][1]) / (followed[-1][0] - followed[0][0])

    @property
    def step_gaps_s(self) -> list[float]:
        """Times between steps once every job had its first token: what one reader waits for each token."""
        return [after[0] - before[0] for before, after in itertools.pairwise(self._decode_trace)]

    @property
    def _decode_trace(self) -> list[tuple[float, int]]:
        return [point for point in self.trace if point[0] >= max(self.first_token_s)]


class Contender(Protocol):
    """A model, loaded and ready. `card` says which; `caches_prefixes` that an equal prompt is cheaper again."""

    name: str
    card: ModelCard
    caches_prefixes: bool

    def run(self, jobs: Sequence[Job], *, fresh: bool = True) -> Round:
        """Answers all jobs at once, greedily and to their full length. `fresh` forgets cached prefixes before."""
        ...

    def close(self) -> None:
        """Releases the model. May be called twice."""
        ...
