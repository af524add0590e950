"""The number with which an answer in prose ends."""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER = re.compile(
    r"""
    (?<!\w)(?<!\d\.)                          # not inside a word, an identifier or another number
    (?P<sign>(?<![)\]%])[-+])?                # after a closing bracket or % it is an operator
    (?:[$€£¥]\s?(?P<late_sign>[-+])?)?        # "$5", "$-5"
    (?:(?P<whole>\d{1,12})[ ]+(?=\d+\s?/\s?[1-9]))?  # "3 1/2"
    (?P<digits>
        (?: \d{1,3}(?:,\d{3})+(?!\d) | \d{1,3}(?:[ ]\d{3})+(?![\d,/]|[ ]?/) | \d+ | (?=\.\d) )
        (?:\.\d+)? (?:[eE][-+]?\d{1,2}(?!\w))?
    )
    (?:\s?/\s?(?P<denominator>[1-9]\d{0,8})(?![\d.,]*\d))?
    (?:[ ]?(?P<scale>(?i:thousand|million|billion|trillion))\b)?
    """,
    re.VERBOSE,
)
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_LONGEST = 100
"""A model that repeats a digit for ever has not given a number."""
_MARKER = "####"
_NEXT_QUESTION = re.compile(r"\n\s*Question:")
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
_ANSWER_IS = re.compile(
    r"\banswer\s+(?:is|would be|will be|equals)\b|\banswer\s*:(?=[^\w\n]*\d)", re.IGNORECASE
)
_LONE_SIGN = re.compile(r"^\s*([-+\N{MINUS SIGN}])[ ]+(?=[$€£¥\d.])")
"""At the beginning of a statement "- 3" is a number; elsewhere the sign is a bullet or an operator."""
_FRACTION = re.compile(r"(\d)?\s*\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}")

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
    after the last "answer is" or "Answer:" with a number; the last number of all. A line with an equation gives what
    stands after its last "=". Signs, decimals, thousands separators, fractions ("3 1/2" and TeX's too), currencies,
    units and "million" are understood; other words for numbers are not. What follows an invented next question is
    not part of the answer.
    """
    own = _without_tex(_NEXT_QUESTION.split(text, maxsplit=1)[0])
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
        if numbers := _numbers(_LONE_SIGN.sub(r"\1", side)):
            return numbers[0]
    return None


def _without_tex(text: str) -> str:
    plain = _TEXT.sub(r"\1", text.replace("{,}", ",").replace("\\,", ","))
    return _FRACTION.sub(
        lambda found: f"{found[1]} {found[2]}/{found[3]}" if found[1] else f"{found[2]}/{found[3]}", plain
    )


def _numbers(text: str) -> list[Fraction]:
    plain = _THIN_SPACES.sub(",", text).translate(_PLAIN)
    return [_value(found) for found in _NUMBER.finditer(plain) if len(found["digits"]) <= _LONGEST]


def _value(found: re.Match[str]) -> Fraction:
    numerator = Fraction(found["digits"].replace(",", "").replace(" ", ""))
    value = numerator / int(found["denominator"] or 1)
    if found["whole"] and value < 1:
        value += int(found["whole"])
    value *= _SCALES.get((found["scale"] or "").lower(), 1)
    return -value if "-" in (found["sign"], found["late_sign"]) else value
