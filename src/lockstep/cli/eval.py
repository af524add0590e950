"""`lockstep eval`: how often a model is right, with an interval, and gates on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lockstep.ci.gates.gsm8k import HUB_ID
from lockstep.cli.opening import loading_bar, open_llm
from lockstep.cli.options import SectionedCommand, engine_options, section
from lockstep.cli.table import print_json, print_table
from lockstep.cli.verdict import print_verdict
from lockstep.config import Given
from lockstep.config.given import gather, wanted

if TYPE_CHECKING:
    from lockstep.ci.gates.accuracy import Evaluation
    from lockstep.ci.gates.asking import Respondent
    from lockstep.ci.gates.verdict import Verdict

GSM8K = "gsm8k"

_exam = section("Questions")
_gate = section("Gates")
_output = section("Output")
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.group("eval", short_help="Measure accuracy, with an interval; gate on it.")
def command() -> None:
    """Ask questions with known answers. docs/gates.md says how the verdicts are reached."""


@command.command(GSM8K, cls=SectionedCommand, short_help="Grade-school mathematics, by few-shot examples.")
@_exam("--shots", type=click.IntRange(min=0), default=5, metavar="N", help="Worked examples shown.  [5]")
@_exam("--num-questions", type=click.IntRange(min=1), metavar="N", help="Questions asked.  [all]")
@_exam("--seed", type=int, default=0, metavar="N", help="Chooses the examples and the questions.  [0]")
@_exam(
    "--data",
    default=HUB_ID,
    metavar="DIR",
    help=f"Directory with train*.jsonl and test.jsonl; {HUB_ID} fetches them from the Hub.  [{HUB_ID}]",
)
@_exam(
    "--max-tokens", type=click.IntRange(min=1), default=512, metavar="N", help="Longest answer, tokens.  [512]"
)
@_exam("--url", metavar="URL", help="Ask this OpenAI-compatible server; MODEL is then its name for the model.")
@_exam(
    "--concurrency",
    type=click.IntRange(1, 256),
    default=16,
    metavar="N",
    help="Questions under way at once.  [16]",
)
@_gate(
    "--min-accuracy",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="X",
    help="Pass only when the interval lies above X, a share such as 0.6.",
)
@_gate(
    "--against",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Pass only when not worse than the run that wrote FILE (--output), question by question.",
)
@_output("--output", type=_FILE, metavar="FILE", help="Write every answer and the result to FILE.")
@_output("--json", "as_json", is_flag=True, help="Print the same as JSON.")
@engine_options(omit=["seed"])
def gsm8k(
    shots: int,
    num_questions: int | None,
    seed: int,
    data: str,
    max_tokens: int,
    url: str | None,
    concurrency: int,
    min_accuracy: float | None,
    against: Path | None,
    output: Path | None,
    as_json: bool,
    options: dict[str, Given],
) -> int:
    """Ask MODEL the GSM8K questions and print how many it answers right, with a 95% interval.

    Exits 1 unless every gate that was asked for passes: one that is undecided does not.
    """
    from lockstep.bench.fingerprint import fingerprint
    from lockstep.ci.gates.accuracy import (
        Conditions,
        compare,
        evaluate,
        judge_change,
        judge_threshold,
        require_comparable,
    )
    from lockstep.ci.gates.accuracy_file import as_document, read_evaluation
    from lockstep.ci.gates.files import require_writable, write_json
    from lockstep.ci.gates.gsm8k import load_problems, make_exam

    baseline = None if against is None else read_evaluation(against)
    training, test = load_problems(data)
    exam = make_exam(training, test, num_shots=shots, num_questions=num_questions, seed=seed)
    conditions = Conditions.of(exam, task=GSM8K, seed=seed, max_tokens=max_tokens)
    if baseline is not None:
        require_comparable(baseline, conditions)
    if output is not None:
        require_writable(output)
    machine = fingerprint()
    with _respondent(url, options) as respondent, loading_bar() as progress:
        evaluation = evaluate(
            respondent,
            exam,
            conditions,
            concurrency=concurrency,
            progress=progress and (lambda done, total: progress("Questions", done, total)),
        )
    change = None if baseline is None else compare(baseline, evaluation)
    verdicts = [] if min_accuracy is None else [judge_threshold(evaluation, min_accuracy)]
    verdicts += [] if change is None else [judge_change(change)]
    document = as_document(evaluation, verdicts, change, machine)
    if as_json:
        print_json(document)
    else:
        _print(evaluation, verdicts)
    if output is not None:
        write_json(document, output)
    return 0 if all(verdict.passed for verdict in verdicts) else 1


@contextmanager
def _respondent(url: str | None, options: Mapping[str, Given]) -> Iterator[Respondent]:
    from lockstep.ci.gates.asking import EngineRespondent, ServerRespondent

    if url is None:
        with open_llm(options) as llm:
            yield EngineRespondent(llm)
        return
    if foreign := [name for name in options if name != "model"]:
        flag = "--" + foreign[0].replace("_", "-")
        raise click.UsageError(f"{flag} belongs to the server that --url names; leave it out here")
    model = str(options["model"].value) if "model" in options else None
    yield ServerRespondent(url, model=model, api_key=wanted(gather({}), "api_key"))


def _print(evaluation: Evaluation, verdicts: list[Verdict]) -> None:
    interval = evaluation.interval
    print_table(
        ("model", "questions", "shots", "right", "accuracy", "95% interval", "no number", "cut"),
        [
            (
                evaluation.model,
                f"{len(evaluation.marked)} of {evaluation.num_available}",
                str(evaluation.conditions.num_shots),
                str(evaluation.num_right),
                f"{evaluation.share:.1%}",
                f"{interval.low:.1%} - {interval.high:.1%}",
                str(evaluation.num_without_number),
                str(evaluation.num_cut),
            )
        ],
    )
    for verdict in verdicts:
        print_verdict(verdict)
