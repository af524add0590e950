"""Twenty simple questions of fact, to the engine and to transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embedded_reference import embedded_model
from greedy_answers import FACTS, NUM_SIMPLE, facts_answered, facts_by_reference, first_difference, is_right

from evidence.part import Findings, Part, cell, verdict
from lockstep.engine.llm import LLM, Completion
from lockstep.formats import embedded_model_path, open_model
from lockstep.tokenizer.loading import load_tokenizer
from peers.markdown import table

CLOSE_CALLS = 1
"""Answers by which the numbers of right ones may differ: a rounding decides some of the first tokens."""


def collect() -> Findings:
    reference = embedded_model()
    ours = _answers()
    exact = [answer.text for answer in _answers(dtype="float32")]
    theirs = facts_by_reference(reference, load_tokenizer(open_model(embedded_model_path())))
    questions = []
    for fact, our, same, their in list(zip(FACTS, ours, exact, theirs, strict=True))[:NUM_SIMPLE]:
        differing = first_difference(reference, our.prompt_token_ids, our.token_ids)
        texts = {"ours": our.text, "ours in float32": same, "theirs": their}
        questions.append(
            {
                "question": fact["question"],
                **{who: {"answer": text, "right": is_right(fact, text)} for who, text in texts.items()},
                "gap": None if differing is None else differing.gap,
            }
        )
    surplus = _num_right(questions, "ours") - _num_right(questions, "theirs")
    passed = abs(surplus) <= CLOSE_CALLS and _num_same(questions, "ours in float32") == len(questions)
    return {"passed": passed, "questions": questions}


def page(found: Mapping[str, Any]) -> str:
    questions = found["questions"]
    rows = [["question", "ours", "right", "transformers", "right", "gap"]]
    for one in questions:
        answers = [(cell(one[who]["answer"]), verdict(one[who]["right"])) for who in ("ours", "theirs")]
        gap = "" if one["gap"] is None else f"{one['gap']:.4f}"
        rows.append([one["question"], *answers[0], *answers[1], gap])
    right = {who: _num_right(questions, who) for who in ("ours", "theirs")}
    same = {who: _num_same(questions, who) for who in ("ours", "ours in float32")}
    return (
        f"{right['ours']} of {len(questions)} right as the engine runs unless told, with 8-bit activations; "
        f"{right['theirs']} in transformers in float32. {same['ours']} answers are the same to the letter, with "
        f"`--dtype float32` {same['ours in float32']}. Where they differ, the gap is by how much transformers' logit "
        f"of its own first differing token is larger than that of ours.\n\n{table(rows)}"
    )


def _answers(**options: Any) -> list[Completion]:
    with LLM(threads=1, max_total_tokens=4096, **options) as llm:
        return facts_answered(llm)


def _num_right(questions: list[dict[str, Any]], who: str) -> int:
    return sum(one[who]["right"] for one in questions)


def _num_same(questions: list[dict[str, Any]], who: str) -> int:
    return sum(one[who]["answer"] == one["theirs"]["answer"] for one in questions)


PART = Part("facts", f"{NUM_SIMPLE} simple questions, beside transformers", collect, page)
