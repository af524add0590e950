"""An evaluation as a JSON document, written for people and later runs, read back as a baseline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from lockstep.ci.gates.accuracy import Change, Evaluation
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


def write_document(document: Mapping[str, Any], path: Path) -> None:
    """Raises ConfigError when the file cannot be written."""
    try:
        path.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from None


def read_evaluation(path: Path) -> Evaluation:
    """The evaluation of a document. Raises ConfigError when it is none, naming what is wrong."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ConfigError(f"{path} has the format {document['format']!r}, not {FORMAT!r}: record it anew")
        evaluation = msgspec.convert(document["evaluation"], Evaluation)
        if len(evaluation.marked) != len(evaluation.conditions.problem_ids) or not evaluation.marked:
            raise ValueError("it has not one answer for each question")
        return evaluation
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no evaluation written by --output: {error}") from None
