"""How long one batch waits for its first token, for the first of a prompt seen before, and for each further one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from lockstep.bench.comparison import Rounds, decode_rates, in_turn, per_round, report_of
from lockstep.bench.contender import Contender, Round
from lockstep.bench.contenders import open_contenders
from lockstep.bench.figures import Figure, percentile
from lockstep.bench.fingerprint import fingerprint
from lockstep.bench.workload import Job, RandomWorkload
from lockstep.config import Given

TIMES_BETTER = 2.0
CACHED_SHARE = 0.1
CACHED_SHARE_INPUT_TOKENS = 512
"""Shorter prompts are no test of the target: what is left to compute weighs too much."""


@dataclass(slots=True)
class _Taken:
    """What one contender has shown. `again` are the same prompts a second time, for one token."""

    rounds: list[Round] = field(default_factory=list)
    again: list[Round] = field(default_factory=list)

    def measure(self, contender: Contender, jobs: Sequence[Job]) -> None:
        self.rounds.append(contender.run(jobs))
        if contender.caches_prefixes:
            self.again.append(contender.run([replace(job, max_tokens=1) for job in jobs], fresh=False))


def main(
    options: Mapping[str, Given],
    *,
    batch_size: int,
    input_tokens: int,
    output_tokens: int,
    repeats: int,
    seed: int,
    compare: str | None,
    json_out: Path | None,
) -> int:
    """Measures, prints and returns the exit code. Rounds of compared contenders alternate; the first is not timed."""
    asked = RandomWorkload(seed, batch_size, input_tokens, output_tokens)
    machine = fingerprint()
    with open_contenders(options, compare) as contenders:
        card = contenders[0].card
        batches = asked.batches(card.vocab_size)
        warm_up = next(batches)
        for contender, jobs in in_turn(contenders, [warm_up], "warming up"):
            _Taken().measure(contender, jobs)
        taken = {contender.name: _Taken() for contender in contenders}
        for contender, jobs in in_turn(
            contenders, islice(batches, repeats), "round {number} of " + str(repeats)
        ):
            taken[contender.name].measure(contender, jobs)
    rounds = {name: found.rounds for name, found in taken.items()}
    figures = _figures(rounds, taken["lockstep"].again, input_tokens)
    report = report_of("latency", rounds, figures, machine=machine, card=card, workload=asked.describe())
    report.publish(json_out)
    return 0


def _figures(rounds: Rounds, again: Sequence[Round], input_tokens: int) -> list[Figure]:
    own = rounds["lockstep"]
    shares = [cached.ttft_s / uncached.ttft_s for uncached, cached in zip(own, again, strict=True)]
    first = [
        Figure(name="time to first token", unit="ms", values=per_round(rounds, lambda one: one.ttft_s * 1e3)),
        Figure(
            name="the same, prompt cached", unit="ms", values={"lockstep": [one.ttft_s * 1e3 for one in again]}
        ),
        Figure(
            name="cached / uncached",
            unit="",
            values={"lockstep": shares},
            at_most=CACHED_SHARE if input_tokens >= CACHED_SHARE_INPUT_TOKENS else None,
        ),
    ]
    return [*first, *decode_rates(rounds, TIMES_BETTER), *_gap_figures(rounds)]


def _gap_figures(rounds: Rounds) -> list[Figure]:
    if not all(one.step_gaps_s for taken in rounds.values() for one in taken):
        return []
    medians = per_round(rounds, lambda one: percentile(one.step_gaps_s, 50) * 1e3)
    slowest = per_round(rounds, lambda one: percentile(one.step_gaps_s, 90) * 1e3)
    return [
        Figure(name="between tokens, p50", unit="ms", values=medians),
        Figure(name="between tokens, p90", unit="ms", values=slowest),
    ]
