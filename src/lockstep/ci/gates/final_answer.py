"""The number with which an answer in prose ends."""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER = re.compile(
    r"""
    (?<!\w)(?<!\d\.)                          # not inside a word, an identifier or another number
    (?P<sign>(?<![)\]%])[-+])?                # after a closing bracket or % it is an operator
    (?:[$€£¥]\s?(?P<late_sign>[-+])?)?        # "$5", "$-5"
    (?P<digits>(?: \d{1,3}(?:,\d{3})+(?!\d) | \d+ | (?=\.\d) ) (?:\.\d+)? (?:[eE][-+]?\d{1,2}(?!\w))?)
    (?:\s?/\s?(?P<denominator>[1-9]\d{0,8})(?![\d.,]*\d))?
    """,
    re.VERBOSE,
)
_LONGEST = 100
"""A model that repeats a digit for ever has not given a number."""
_MARKER = "####"
_NEXT_QUESTION = re.compile(r"\n\s*Question:")
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
_ANSWER_IS = re.compile(r"\banswer\s+(?:is|would be|will be|equals)\b", re.IGNORECASE)

_PLAIN = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{EN DASH}": "-",
        "\N{NO-BREAK SPACE}": " ",
        "*": " ",
        "`": " ",
        "~": " ",
        "_": " ",
        "\\": " ",
    }
)
_THIN_SPACES = re.compile(r"(?<=\d)[\u202f\u2009](?=\d{3}(?!\d))")


def final_number(text: str) -> Fraction | None:
    """The number that `text` gives as its result, exact; None when there is none.

    Looked for, in this order: after the first "####", the format that few-shot examples show; in the last \\boxed{};
    after the last "answer is"; the last number of all. A line with an equation gives what stands after its last "=".
    Signs, decimals, thousands separators, fractions, currencies and units are understood; words for numbers are not.
    What follows an invented next question is not part of the answer.
    """
    own = _NEXT_QUESTION.split(text, maxsplit=1)[0]
    _, marker, after = own.partition(_MARKER)
    if marker and (found := _result_of(after.lstrip().partition("\n")[0])) is not None:
        return found
    said = [rest.partition("\n")[0] for rest in _ANSWER_IS.split(own)[1:]]
    for statement in (*reversed(_BOXED.findall(own)), *reversed(said)):
        if (found := _result_of(statement)) is not None:
            return found
    numbers = _numbers(own)
    return numbers[-1] if numbers else None


def _result_of(statement: str) -> Fraction | None:
    """The first number after the last "=" that has one."""
    for side in reversed(statement.split("=")):
        if numbers := _numbers(side):
            return numbers[0]
    return None


def _numbers(text: str) -> list[Fraction]:
    plain = _THIN_SPACES.sub(",", text.replace("{,}", ",")).translate(_PLAIN)
    return [_value(found) for found in _NUMBER.finditer(plain) if len(found["digits"]) <= _LONGEST]


def _value(found: re.Match[str]) -> Fraction:
    value = Fraction(found["digits"].replace(",", "")) / int(found["denominator"] or 1)
    return -value if "-" in (found["sign"], found["late_sign"]) else value
