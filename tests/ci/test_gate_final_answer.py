"""The number of an answer: a table of how models write it, and properties of numbers written at random."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.ci.gates.final_answer import final_number

pytestmark = pytest.mark.suite("cpu", seconds=2)

TABLE = {
    # the format of the examples
    "#### 18": "18",
    "She sells 9 eggs.\nShe makes 9 * 2 = $18.\n#### 18": "18",
    "####18": "18",
    "#### \n 18": "18",
    "18 eggs\n#### 5\n#### 6": "5",
    "#### 16 - 3 = 13": "13",
    "#### 70,000 dollars": "70000",
    "#### 18 eggs at $2 each": "18",
    "#### none, so 7": "7",
    "#### ?\nThe answer is 4.": "4",
    # decimals
    "#### 2.50": "5/2",
    "#### 18.0": "18",
    "It is .5": "1/2",
    "It weighs 1.5.": "3/2",
    "It costs 3.20, or so": "16/5",
    # negatives
    "#### -10": "-10",
    "The change is \N{MINUS SIGN}3 degrees": "-3",
    "a loss of -$5": "-5",
    "a loss of $-5": "-5",
    "x=-3": "-3",
    "(-8)": "-8",
    "#### +4": "4",
    # operators and hyphens are no signs
    "so 10-3": "3",
    "10 - 3": "3",
    "COVID-19": "19",
    "(4)-3": "3",
    "20%-30%": "30",
    "from 5\N{EN DASH}10": "10",
    "- 5 apples": "5",
    # thousands separators
    "#### 1,450,000": "1450000",
    "It is 80,000, all told": "80000",
    "10\u202f000 m": "10000",
    r"\boxed{1{,}000}": "1000",
    "1, 2, 3": "3",
    "$1,234.50": "2469/2",
    # currencies and units
    "$ 18": "18",
    "18$": "18",
    "£3.20": "16/5",
    "€ 20": "20",
    "US$20": "20",
    "Rs.500": "500",
    "50%": "50",
    "3 hours": "3",
    "60km/h": "60",
    "the 12th": "12",
    "30-minute": "30",
    # markup
    "**18**": "18",
    "`18`": "18",
    r"$\boxed{42}$": "42",
    r"costs \$18": "18",
    r"\boxed{7} and then 9": "7",
    "_8_": "8",
    # fractions and powers of ten
    "1/2 cup": "1/2",
    "#### 3 / 4": "3/4",
    "2/0": "0",
    "5e3": "5000",
    r"\boxed{\frac{1}{2}}": "1/2",
    r"\boxed{-\dfrac{3}{4}}": "-3/4",
    r"$\boxed{3\frac{1}{2}}$": "7/2",
    r"\boxed{\text{18 eggs}}": "18",
    r"\boxed{12\,000}": "12000",
    "#### 3 1/2": "7/2",
    "#### -3 1/2": "-7/2",
    "3 1/2 cups left.": "7/2",
    "It takes 12 3/4 hours": "51/4",
    "2 4/2": "2",
    # a sign apart, groups of three, and large numbers in words
    "#### - 3": "-3",
    "#### - $3": "-3",
    "#### x = - 3": "-3",
    "#### 10 000": "10000",
    "#### 1 234 567 people": "1234567",
    "They sold 10 000": "10000",
    "#### 1234 567": "1234",
    "#### 1.5 million": "1500000",
    "#### $2 Billion": "2000000000",
    "3 thousand": "3000",
    "#### 2 millionaires": "2",
    # sentences
    "Answer: 42 (in 7 days)": "42",
    "**Answer:** $42 after 7 days": "42",
    "Answer: 40 + 2 = 42 in 7 days": "42",
    "Answer: Ann has 3 and buys 4, so 7": "7",
    "The answer is 12 apples. 7 are left": "12",
    "The answer is 5 + 3 = 8 apples": "8",
    "The answer is: 4. No, the answer is 6": "6",
    "The final answer is:\n\n42": "42",
    "9*2=18": "18",
    # what follows is another question
    "It is 5.\n\nQuestion: How many are 7?": "5",
    "#### 5\nQuestion: What?\nAnswer: 6\n#### 6": "5",
}

NOTHING = ("", "none", "v1.2.3", "A1", "eighteen", "#### \n", "Question", "…", "7" * 5000)


@pytest.mark.parametrize(("text", "number"), TABLE.items())
def test_the_table(text: str, number: str) -> None:
    assert final_number(text) == Fraction(number)


@pytest.mark.parametrize("text", NOTHING)
def test_no_number(text: str) -> None:
    assert final_number(text) is None


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 40


@given(
    st.integers(-(10**12), 10**12),
    st.sampled_from(("#### {}", "The answer is {}.", "so ${}", "{} eggs", r"\boxed{{{}}}", "**{}**", "= {}%")),
    st.sampled_from(("{}", "{:,}")),
)
def test_every_integer_is_read_as_python_writes_it(number: int, sentence: str, written: str) -> None:
    assert final_number(sentence.format(written.format(number))) == number


@given(st.decimals(-(10**6), 10**6, places=3))
def test_every_decimal_is_read_exactly(number: object) -> None:
    assert final_number(f"12 + 3\n#### {number:,f}") == Fraction(str(number))


@given(st.text())
def test_no_text_is_too_strange(text: str) -> None:
    final_number(text)
