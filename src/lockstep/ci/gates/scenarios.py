"""What the performance gate times: scenarios with their stages, each stage a span of seconds."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from lockstep.bench.child import ChildContender
from lockstep.bench.contender import Contender
from lockstep.bench.startup import measure_start
from lockstep.bench.workload import RandomWorkload
from lockstep.config import Given
from lockstep.core.errors import ConfigError, nearest
from lockstep.core.output import ModelCard

_SEED = 0
_WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a scenario: stage -> seconds, and facts about the model that was timed."""

    stages: Mapping[str, float]
    model: Mapping[str, Any]


class Scenario(Protocol):
    """Anything that can be timed in stages."""

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of all stages that a run must have."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """The work, as JSON types; equal for equal work."""
        ...

    def run(self, options: Mapping[str, Given]) -> Run:
        """Times every stage once."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScenario:
    """One reader's wait, then a batch of requests, with random prompts that are the same in every run.

    Stages: `start` from the start of a process to its first token; `prefill` of one prompt of `input_tokens`;
    `decode` of its next `output_tokens`, seconds per token; `throughput` of `num_requests` prompts at once, each of
    `batch_input_tokens` and answered with `output_tokens`, the whole batch. The last three are medians of `repeats`.
    """

    input_tokens: int
    output_tokens: int
    num_requests: int
    batch_input_tokens: int
    repeats: int = 3

    @property
    def stages(self) -> tuple[str, ...]:
        return ("start", "prefill", "decode", "throughput")

    def describe(self) -> dict[str, int]:
        """The shape: figures of one shape say nothing about another."""
        return dataclasses.asdict(self)

    def run(self, options: Mapping[str, Given]) -> Run:
        """Times every stage once, in fresh processes: runs differ as much as two days' runs would.

        Raises LockstepError when the model cannot be opened or an answer finds no room.
        """
        start_s = measure_start(options).first_token_s
        with closing(ChildContender("lockstep", options)) as contender:
            return Run({"start": start_s, **self._loaded(contender)}, _identity(contender.card))

    def _loaded(self, contender: Contender) -> dict[str, float]:
        vocab_size = contender.card.vocab_size
        alone = RandomWorkload(_SEED, 1, self.input_tokens, self.output_tokens).batches(vocab_size)
        together = RandomWorkload(
            _SEED, self.num_requests, self.batch_input_tokens, self.output_tokens
        ).batches(vocab_size)
        for warm_up in (next(alone), next(together)):
            contender.run([dataclasses.replace(job, max_tokens=_WARM_UP_TOKENS) for job in warm_up])
        single = [contender.run(next(alone)) for _ in range(self.repeats)]
        batch = [contender.run(next(together)) for _ in range(self.repeats)]
        rates = [one.decode_tokens_per_s for one in single]
        return {
            "prefill": statistics.median(one.ttft_s for one in single),
            "decode": statistics.median(1 / rate for rate in rates if rate is not None),
            "throughput": statistics.median(one.seconds for one in batch),
        }


SCENARIOS: dict[str, Scenario] = {
    "text": TextScenario(input_tokens=512, output_tokens=64, num_requests=16, batch_input_tokens=128),
    "text-small": TextScenario(input_tokens=64, output_tokens=16, num_requests=4, batch_input_tokens=32),
}


def scenario_named(name: str) -> Scenario:
    """Raises ConfigError naming the nearest."""
    if name not in SCENARIOS:
        raise ConfigError(
            f"unknown scenario {name!r}{nearest(name, SCENARIOS)} (known: {', '.join(SCENARIOS)})"
        )
    return SCENARIOS[name]


def _identity(card: ModelCard) -> dict[str, Any]:
    """What makes two models the same work, wherever their files lie."""
    names = ("name", "architecture", "dtype", "quantization", "num_parameters")
    return {name: getattr(card, name) for name in names}
