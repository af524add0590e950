"""Suite marks as text: what counts for which test, and everything that is refused."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

import pytest
from suite_project import make_project

from lockstep.ci.marks import Disabled, MarkedFile, MarkError, read_marks
from lockstep.ci.project import Project, open_project

pytestmark = pytest.mark.suite("cpu")

NESTED = """
import pytest

pytestmark = [pytest.mark.usefixtures("tmp_path"), pytest.mark.suite("cpu", seconds=3)]


def test_plain():
    pass


@pytest.mark.suite("sim", stage="nightly")
@pytest.mark.parametrize("x", [1, 2])
def test_own(x):
    pass


class TestGroup:
    pytestmark = pytest.mark.suite("sim", exclusive=True)

    def test_inside(self):
        pass

    @pytest.mark.suite("cpu", "sim")
    def test_inside_own(self):
        pass

    class TestDeeper:
        def test_deep(self):
            pass


@pytest.mark.suite("cpu-2")
class TestDecorated:
    async def test_later(self):
        pass


if True:

    def test_below_if():
        pass
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    make_project(tmp_path, {"test_a.py": "def test_a(): pass"})
    return open_project(tmp_path)


def read(text: str, project: Project) -> MarkedFile:
    return read_marks("tests/test_x.py", text, project)


def test_the_nearest_mark_counts_as_it_does_for_pytest(pytester: pytest.Pytester, project: Project) -> None:
    """Pytest imports the file and asks for the closest mark; here only the text is read."""
    path = pytester.makepyfile(test_nested=NESTED)
    collected = {}
    for item in pytester.getitems(path.read_text()):
        classes = [node.name for node in item.listchain() if isinstance(node, pytest.Class)]
        mark = item.get_closest_marker("suite")
        assert mark is not None
        collected["::".join([*classes, item.originalname])] = mark.args  # type: ignore[attr-defined]
    file = read(NESTED, project)
    marks = {test: file.mark_of(test) for test in file.tests}
    assert {test: mark.suites for test, mark in marks.items() if mark is not None} == collected
    assert len(collected) == 7


def test_what_a_mark_says(project: Project) -> None:
    text = """
import pytest
pytestmark = pytest.mark.suite("cpu", "sim", seconds=2.5, stage="nightly", needs=("fp8",), exclusive=True,
    disabled="breaks", issue="https://example.org/1", since="2026-01-31")
def test_a(): pass
"""
    mark = read(text, project).mark_of("test_a")
    assert mark is not None
    assert (mark.suites, mark.seconds, mark.stage, mark.needs) == (("cpu", "sim"), 2.5, "nightly", ("fp8",))
    assert mark.exclusive and mark.disabled == Disabled("breaks", "https://example.org/1", date(2026, 1, 31))
    assert not mark.belongs("cpu", "nightly")


def test_an_exclusive_test_is_a_target_of_its_own(project: Project) -> None:
    file = read(NESTED, project)
    assert file.target_of("test_own") == "tests/test_x.py"
    assert file.target_of("TestGroup::TestDeeper::test_deep") == "tests/test_x.py::TestGroup"
    assert file.target_of("TestGroup::test_inside_own") == "tests/test_x.py"
    whole = read(
        'import pytest\npytestmark = pytest.mark.suite("cpu", exclusive=True)\ndef test_a(): pass', project
    )
    assert whole.target_of("test_a") == "tests/test_x.py"


def test_tests_that_come_from_elsewhere_are_seen(project: Project) -> None:
    file = read(
        "from shared import test_a, helper\ntest_b = helper()\nclass TestC(Base):\n    x = 1\n", project
    )
    assert file.tests == ("test_a", "test_b", "TestC")


def test_classes_as_pytest_takes_them(project: Project) -> None:
    text = """
import unittest
class Arith(unittest.TestCase):
    def __init__(self, name): super().__init__(name)
    def test_a(self): pass
class TestResult:
    __test__ = False
    def test_b(self): pass
class Helper:
    def test_c(self): pass
class TestMore(Shared):
    def test_d(self): pass
if sys.platform == "linux":
    def test_e(): pass
else:
    def test_e(): pass
"""
    file = read(text, project)
    assert file.tests == ("Arith::test_a", "TestMore::test_d", "test_e")
    assert file.inheriting == {"Arith", "TestMore"}
    assert file.knows("TestMore::test_inherited") and not file.knows("test_f") and file.knows("test_e")


WRONG = {
    'pytestmark = pytest.mark.suite("cpuu")': "unknown suite 'cpuu'; did you mean 'cpu'?",
    "pytestmark = pytest.mark.suite()": "names its suites first",
    "pytestmark = pytest.mark.suite": "belongs into `pytestmark` or directly above",
    "pytestmark = pytest.mark.suite(1)": "names its suites first",
    "pytestmark = pytest.mark.suite(NAME)": "literals only, not `NAME`",
    'pytestmark = pytest.mark.suite("cpu", seconds=2 * 3)': "literals only, not `2 * 3`",
    'pytestmark = pytest.mark.suite("cpu", *MORE)': "literals only, not `*MORE`",
    'pytestmark = pytest.mark.suite("cpu", **MORE)': "has no '**'",
    'pytestmark = pytest.mark.suite("cpu", "cpu")': "suite 'cpu' is named twice",
    'pytestmark = pytest.mark.suite("cpu", second=3)': "has no 'second'; did you mean 'seconds'?",
    'pytestmark = pytest.mark.suite("cpu", seconds=0)': "a number above 0, not 0",
    'pytestmark = pytest.mark.suite("cpu", seconds=True)': "a number above 0, not True",
    'pytestmark = pytest.mark.suite("cpu", seconds=float("nan"))': "literals only",
    'pytestmark = pytest.mark.suite("cpu", stage="nightl")': "unknown stage 'nightl'; did you mean 'nightly'?",
    'pytestmark = pytest.mark.suite("cpu", needs="fp8")': "must be a tuple of names",
    'pytestmark = pytest.mark.suite("cpu", needs=("fp9",))': "unknown capability 'fp9'; did you mean 'fp8'?",
    'pytestmark = pytest.mark.suite("cpu", exclusive="yes")': "True or False, not 'yes'",
    'pytestmark = pytest.mark.suite("cpu", disabled="slow")': "issue is missing",
    'pytestmark = pytest.mark.suite("cpu", disabled="a", issue="https://b")': "since is missing",
    'pytestmark = pytest.mark.suite("cpu", disabled="a", issue="#3", since="2026-01-31")': "must be a link, not '#3'",
    'pytestmark = pytest.mark.suite("cpu", disabled="a", issue="https://b", since="Monday")': "must be a date",
    'pytestmark = pytest.mark.suite("cpu", disabled="a", issue="https://b", since="2999-01-01")': "lie in the future",
    'pytestmark = [pytest.mark.suite("cpu"), pytest.mark.suite("sim")]': "a second suite mark",
    'pytestmark = make(pytest.mark.suite("cpu"))': "belongs into `pytestmark`",
    'if True:\n    pytestmark = pytest.mark.suite("cpu")': "belongs into `pytestmark`",
    'mine = pytest.mark.suite("cpu")': "belongs into `pytestmark`",
    'from pytest import mark\nmine = mark.suite("cpu")': "belongs into `pytestmark`",
    '@pytest.mark.parametrize("x", [pytest.param(1, marks=pytest.mark.suite("cpu"))])\ndef test_a(x): pass': "belongs",
    "def test_a(:": "not Python",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items())
def test_wrong_marks_are_errors_that_name_file_and_line(text: str, message: str, project: Project) -> None:
    with pytest.raises(MarkError, match=re.escape(message)) as caught:
        read(f"import pytest\n\n{text}\n", project)
    assert str(caught.value).startswith(("tests/test_x.py:3: ", "tests/test_x.py:4: "))
