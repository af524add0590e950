"""A run's report for machines and for pages: JSON, JUnit XML and Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from lockstep.ci.results import STATUSES, RunReport, SuiteReport, TestResult

JSON_NAME, JUNIT_NAME, MARKDOWN_NAME = "report.json", "junit.xml", "summary.md"
DURATIONS_NAME = "durations.json"
"""What the run measured of it, in the form of the project's own file."""
LINES_SHOWN = 30
"""Of one failure, in Markdown."""

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def write_reports(report: RunReport, folder: Path) -> None:
    """Writes report.json, junit.xml and summary.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON_NAME).write_text(json.dumps(as_json(report), indent=1) + "\n", "utf-8")
    (folder / JUNIT_NAME).write_text(as_junit(report), "utf-8")
    (folder / MARKDOWN_NAME).write_text(as_markdown(report), "utf-8")


def as_json(report: RunReport) -> dict[str, Any]:
    """Everything, every attempt included."""
    return {
        "exit_code": report.exit_code,
        "stage": report.stage,
        "wall_s": round(report.wall_s, 2),
        "flaky": {"found": report.num_flaky, "budget": report.flaky_budget},
        "stopped_early": report.stopped,
        "interrupted": report.interrupted,
        "machine": report.machine,
        "suites": [_suite_json(suite) for suite in report.suites],
    }


def _suite_json(suite: SuiteReport) -> dict[str, Any]:
    return {
        "suite": suite.name,
        "verdict": suite.verdict,
        "missing": suite.missing,
        "counts": {status: suite.counts[status] for status in STATUSES},
        "not_run": [{"test": test, "reason": reason} for test, reason in suite.not_run],
        "tests": [
            {
                "test": result.test,
                "stage": result.stage,
                "status": result.status,
                "seconds": round(result.seconds, 3),
                "attempts": [
                    {
                        "outcome": attempt.outcome,
                        "seconds": round(attempt.seconds, 3),
                        "infrastructure": attempt.infrastructure,
                        "text": attempt.text,
                    }
                    for attempt in result.attempts
                ],
            }
            for result in suite.results
        ],
    }


def as_junit(report: RunReport) -> str:
    """One <testsuite> a suite. Earlier attempts of a test that passed in the end stand in <flakyFailure>, those of one
    that failed in <rerunFailure>: the elements of Maven Surefire's schema, which CI systems show.

    A flaky test counts as failed when the budget is exceeded, and a run that was cut short has an error, so that a
    reader of this file alone sees what the exit code says.
    """
    root = ElementTree.Element("testsuites", time=f"{report.wall_s:.3f}")
    flaky_fails = report.num_flaky > report.flaky_budget
    for suite in report.suites:
        failed = suite.counts["failed"] + (suite.counts["flaky"] if flaky_fails else 0)
        nothing = not suite.ran and not failed
        node = ElementTree.SubElement(
            root,
            "testsuite",
            name=suite.name,
            tests=str(len(suite.results) + nothing),
            failures=str(failed),
            errors=str(int(nothing)),
            skipped=str(suite.counts["skipped"]),
            time=f"{sum(result.seconds for result in suite.results):.3f}",
        )
        if nothing:
            case = ElementTree.SubElement(node, "testcase", classname=suite.name, name="a test ran", time="0")
            ElementTree.SubElement(case, "error", message=suite.missing or "the suite selected no test")
        for result in suite.results:
            _add_case(node, result, flaky_fails)
    if report.cut_short:
        node = ElementTree.SubElement(root, "testsuite", name="run", tests="1", failures="0", errors="1")
        case = ElementTree.SubElement(
            node, "testcase", classname="run", name="every test was reached", time="0"
        )
        ElementTree.SubElement(case, "error", message=report.cut_short)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _add_case(node: ElementTree.Element, result: TestResult, flaky_fails: bool) -> None:
    case = ElementTree.SubElement(
        node,
        "testcase",
        classname=result.path,
        name=_clean(result.test.partition("::")[2] or result.test),
        time=f"{result.seconds:.3f}",
    )
    *earlier, last = result.attempts
    if result.status == "skipped":
        ElementTree.SubElement(case, "skipped", message=_clean(last.text))
    if result.status == "failed" or (result.status == "flaky" and flaky_fails):
        shown = last if last.outcome == "failed" else earlier[0]
        kind = "flaky" if result.status == "flaky" else shown.infrastructure or "failure"
        failure = ElementTree.SubElement(case, "failure", message=_clean(headline(shown.text)), type=kind)
        failure.text = _clean(shown.text)
    tag = "rerunFailure" if result.status == "failed" else "flakyFailure"
    for attempt in earlier:
        kind = attempt.infrastructure or "failure"
        ElementTree.SubElement(case, tag, message=_clean(headline(attempt.text)), type=kind).text = _clean(
            attempt.text
        )


def as_markdown(report: RunReport) -> str:
    """A summary for the page of a CI run."""
    return "\n".join(_markdown(report)) + "\n"


def _markdown(report: RunReport) -> Iterator[str]:
    yield f"## Suites: {'passed' if report.exit_code == 0 else 'not passed'}\n"
    yield f"Stage {report.stage}, {report.wall_s:.0f} s, exit code {report.exit_code}."
    if report.cut_short:
        yield report.cut_short
    if report.num_flaky:
        yield f"{report.num_flaky} flaky, {report.flaky_budget} allowed."
    yield "\n| suite | verdict | " + " | ".join(STATUSES) + " | not run | test seconds |"
    yield "|---|---|" + "--:|" * (len(STATUSES) + 2)
    for suite in report.suites:
        counts = " | ".join(str(suite.counts[status]) for status in STATUSES)
        seconds = sum(result.seconds for result in suite.results)
        verdict = f"{suite.verdict}: {suite.missing}" if suite.missing else suite.verdict
        yield f"| {suite.name} | {_cell(verdict)} | {counts} | {len(suite.not_run)} | {seconds:.1f} |"
    for suite in report.suites:
        for result in suite.results:
            if result.status in ("failed", "flaky", "recovered"):
                yield from _markdown_attempts(suite.name, result)
        for test, reason in suite.not_run:
            yield f"\n- not run in {suite.name}: `{test}`: {reason}"


def _markdown_attempts(suite: str, result: TestResult) -> Iterator[str]:
    yield f"\n<details><summary>{result.status} in {suite}: <code>{_html(result.test)}</code></summary>\n"
    for number, attempt in enumerate(result.attempts, 1):
        whose = f" ({attempt.infrastructure})" if attempt.infrastructure else ""
        yield f"Attempt {number}: {attempt.outcome}{whose}, {attempt.seconds:.1f} s\n"
        if attempt.outcome == "failed":
            # Indented code cannot be closed by backquotes in the text.
            yield from (f"    {line}" for line in _clean(attempt.text).splitlines()[-LINES_SHOWN:])
            yield ""
    yield "</details>"


def headline(text: str) -> str:
    """The line of a failure that says most: pytest's first `E` line, else the last that is not empty."""
    lines = [line.strip() for line in text.partition("\n--- ")[0].splitlines() if line.strip()]
    marked = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (marked or lines[-1:] or [""])[0]


def _clean(text: str) -> str:
    """Without colours, and with what XML cannot hold replaced."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", _COLOURS.sub("", text))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _html(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
