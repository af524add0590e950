"""An evaluation as a JSON document, written for people and later runs, read back as a baseline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec

from lockstep.ci.gates.accuracy import Change, Evaluation, mark
from lockstep.ci.gates.asking import Reply
from lockstep.ci.gates.verdict import Verdict
from lockstep.core.errors import ConfigError

FORMAT = "lockstep-evaluation-1"


def as_document(
    evaluation: Evaluation,
    verdicts: Sequence[Verdict],
    change: Change | None,
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything about one run. What a later run compares with stands under "evaluation"."""
    interval = evaluation.interval
    return {
        "format": FORMAT,
        "date": date.today().isoformat(),
        "machine": machine,
        "result": {
            "num_questions": len(evaluation.marked),
            "num_right": evaluation.num_right,
            "share": evaluation.share,
            "interval": [interval.low, interval.high],
            "num_without_number": evaluation.num_without_number,
            "num_cut": evaluation.num_cut,
        },
        "change": None if change is None else change.as_json(),
        "verdicts": [verdict.as_json() for verdict in verdicts],
        "evaluation": msgspec.to_builtins(evaluation),
    }


def read_evaluation(path: Path) -> Evaluation:
    """The evaluation of a document, its answers marked anew from the words of the model: what the file says of them
    is for readers. Raises ConfigError when it is none, naming what is wrong.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ConfigError(f"{path} has the format {document['format']!r}, not {FORMAT!r}: record it anew")
        evaluation = msgspec.convert(document["evaluation"], Evaluation)
        problem_ids = evaluation.conditions.problem_ids
        if len(evaluation.marked) != len(problem_ids) or not evaluation.marked:
            raise ValueError("it has not one answer for each question")
        if len(set(problem_ids)) < len(problem_ids):
            raise ValueError("it has a question more than once")
        marked = (mark(Fraction(one.expected), Reply(one.text, one.cut)) for one in evaluation.marked)
        return replace(evaluation, marked=tuple(marked))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"{path} is no evaluation written by --output: {error}") from None
