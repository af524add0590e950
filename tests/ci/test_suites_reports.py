"""Reports agree with each other and with the exit code, and survive whatever a test prints."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lockstep.ci.reports import as_json, as_junit, as_markdown, headline, write_reports
from lockstep.ci.results import Attempt, RunReport, Status, SuiteReport, TestResult

pytestmark = pytest.mark.suite("cpu")

PASSED, SKIPPED = Attempt("passed", 1.0), Attempt("skipped", 0.1, "no wish")
FAILED = Attempt("failed", 2.0, "def f():\nE   assert 1 == 2\n--- Captured stdout\nseed 3")
MACHINE = Attempt("failed", 2.0, "E   OSError: in use", "port in use")
ATTEMPTS: dict[Status, list[Attempt]] = {
    "passed": [PASSED],
    "skipped": [SKIPPED],
    "recovered": [MACHINE, MACHINE, PASSED],
    "flaky": [FAILED, PASSED],
    "failed": [FAILED, FAILED],
}


def a_test(status: Status, attempts: list[Attempt] | None = None) -> TestResult:
    path = "tests/test_a.py"
    return TestResult("cpu", path, f"{path}::test_{status}", "per-commit", attempts or ATTEMPTS[status])


def a_run(*results: TestResult, budget: int = 0, missing: str | None = None) -> RunReport:
    return RunReport([SuiteReport("cpu", missing, list(results))], "per-commit", 9.0, budget)


@pytest.mark.parametrize("status", ATTEMPTS)
def test_attempts_make_the_status(status: Status) -> None:
    assert a_test(status).status == status


@pytest.mark.parametrize(
    ("attempts", "status"),
    [
        ([MACHINE, FAILED], "failed"),
        ([MACHINE, FAILED, PASSED], "flaky"),
        ([FAILED, SKIPPED], "failed"),
        ([MACHINE, MACHINE, MACHINE], "failed"),
    ],
)
def test_no_order_of_attempts_hides_a_failure(attempts: list[Attempt], status: Status) -> None:
    assert a_test("failed", attempts).status == status


@pytest.mark.parametrize(
    ("statuses", "budget", "code"),
    [
        (("passed",), 0, 0),
        (("passed", "recovered", "skipped"), 0, 0),
        (("passed", "flaky"), 0, 1),
        (("passed", "flaky"), 1, 0),
        (("passed", "flaky", "flaky"), 1, 1),
        (("passed", "failed"), 5, 1),
        (("skipped",), 0, 5),
        ((), 0, 5),
    ],
)
def test_exit_codes_and_junit_agree(statuses: tuple[Status, ...], budget: int, code: int) -> None:
    """A reader of the XML alone sees a run that is not green as not green."""
    report = a_run(*map(a_test, statuses), budget=budget)
    assert report.exit_code == code == as_json(report)["exit_code"]
    root = ElementTree.fromstring(as_junit(report))
    bad = root.findall(".//failure") + root.findall(".//error")
    assert bool(bad) == (code != 0)
    (suite,) = root.findall("testsuite")
    assert int(suite.get("failures", "")) == len(root.findall(".//failure"))
    assert int(suite.get("errors", "")) == len(root.findall(".//error"))
    assert int(suite.get("skipped", "")) == len(root.findall(".//skipped"))
    assert int(suite.get("tests", "")) == len(root.findall(".//testcase"))


def test_a_run_without_suites_is_not_green() -> None:
    assert RunReport([], "all", 0.0).exit_code == 5


def test_every_attempt_is_kept_in_every_report() -> None:
    report = a_run(*map(a_test, ATTEMPTS))
    found = {each["status"]: each["attempts"] for each in as_json(report)["suites"][0]["tests"]}
    assert {status: len(attempts) for status, attempts in found.items()} == {
        status: len(attempts) for status, attempts in ATTEMPTS.items()
    }
    assert [each["infrastructure"] for each in found["recovered"]] == ["port in use", "port in use", None]
    root = ElementTree.fromstring(as_junit(report))
    assert len(root.findall(".//flakyFailure")) == 3 and len(root.findall(".//rerunFailure")) == 1
    page = as_markdown(report)
    assert page.count("Attempt ") == 3 + 2 + 2 and "port in use" in page and "assert 1 == 2" in page


def test_what_tests_print_cannot_break_a_report(tmp_path: Path) -> None:
    nasty = "E   \x1b[31mred\x1b[0m \x00 \ud800 ]]> </failure> & ``` </details>\n"
    failed = Attempt("failed", 0.1, nasty.encode("utf-8", "replace").decode())
    report = a_run(a_test("failed", [failed]), TestResult("cpu", "a", "a::test[<&>|`]", "nightly", [failed]))
    write_reports(report, tmp_path)
    message = ElementTree.parse(tmp_path / "junit.xml").findall(".//failure")[0].get("message", "")
    assert message.startswith("red ") and "]]> </failure> &" in message and "\x00" not in message
    assert json.loads((tmp_path / "report.json").read_text())["exit_code"] == 1
    lines = (tmp_path / "summary.md").read_text().splitlines()
    assert sum(line == "</details>" for line in lines) == 2
    assert all(line.startswith("    ") for line in lines if "```" in line)


def test_what_is_missing_is_said() -> None:
    report = a_run(missing="needs 1 cuda device, this machine has none")
    assert report.exit_code == 5
    for text in (as_markdown(report), as_junit(report), json.dumps(as_json(report))):
        assert "needs 1 cuda device, this machine has none" in text


def test_the_headline_is_the_line_that_says_most() -> None:
    assert headline(FAILED.text) == "assert 1 == 2"
    assert headline("one\ntwo\n\n") == "two"
    assert headline("") == ""
