"""Tokens per second of many requests that are all present from the start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

from lockstep.bench.comparison import Rounds, decode_rates, in_turn, per_round, report_of
from lockstep.bench.contender import Round
from lockstep.bench.contenders import open_contenders
from lockstep.bench.figures import Figure
from lockstep.bench.fingerprint import fingerprint
from lockstep.bench.workload import choose_workload
from lockstep.config import Given

WARM_UP_TOKENS = 4
TIMES_BETTER = 2.0


def main(
    options: Mapping[str, Given],
    *,
    num_requests: int | None,
    input_tokens: int | None,
    output_tokens: int | None,
    workload: Path | None,
    repeats: int,
    seed: int,
    compare: str | None,
    json_out: Path | None,
) -> int:
    """Measures, prints and returns the exit code. Rounds of compared contenders alternate: A B A B.

    Before the timed rounds, each contender answers one batch of the same shape, a few tokens long.
    """
    asked = choose_workload(
        workload, seed=seed, num_requests=num_requests, input_tokens=input_tokens, output_tokens=output_tokens
    )
    machine = fingerprint()
    with open_contenders(options, compare) as contenders:
        card = contenders[0].card
        batches = asked.batches(card.vocab_size)
        warm_up = [replace(job, max_tokens=min(job.max_tokens, WARM_UP_TOKENS)) for job in next(batches)]
        for contender, jobs in in_turn(contenders, [warm_up], "warming up"):
            contender.run(jobs)
        rounds: dict[str, list[Round]] = {contender.name: [] for contender in contenders}
        for contender, jobs in in_turn(
            contenders, islice(batches, repeats), "round {number} of " + str(repeats)
        ):
            rounds[contender.name].append(contender.run(jobs))
    report = report_of(
        "throughput", rounds, _figures(rounds), machine=machine, card=card, workload=asked.describe()
    )
    report.publish(json_out)
    return 0


def _figures(rounds: Rounds) -> list[Figure]:
    own = {"lockstep": rounds["lockstep"]}
    return [
        Figure(
            name="output",
            unit="tokens/s",
            values=per_round(rounds, lambda one: one.output_tokens_per_s),
            higher_is_better=True,
            times_better=TIMES_BETTER,
        ),
        Figure(
            name="prompt and output",
            unit="tokens/s",
            values=per_round(rounds, lambda one: one.total_tokens_per_s),
            higher_is_better=True,
        ),
        *decode_rates(rounds),
        Figure(
            name="time to first token, median request",
            unit="s",
            values=per_round(rounds, lambda one: one.ttft_s),
        ),
        Figure(name="whole batch", unit="s", values=per_round(rounds, lambda one: one.seconds)),
        Figure(name="steps", unit="", values=per_round(own, lambda one: one.num_steps)),
        Figure(name="tokens per step", unit="", values=per_round(own, lambda one: one.tokens_per_step)),
        Figure(name="preemptions", unit="", values=per_round(own, lambda one: one.num_preemptions)),
    ]
