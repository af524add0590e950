"""Every call that the tests of OpenAI's own client make to `lockstep serve`, and how it was answered."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import openai
import pytest

from evidence.part import Findings, Part, cell, verdict
from peers.markdown import table

TESTS = Path(__file__).parents[2] / "tests" / "engine" / "test_clients_openai.py"
NOT_SHOWN = ("model", "messages", "prompt", "input")


class Recorder:
    """A pytest plugin that writes down each test's outcome and each call made in it, those of its fixtures included."""

    def __init__(self) -> None:
        self.tests: list[dict[str, Any]] = []

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.tests.append({"test": nodeid.rpartition("::")[2], "passed": False, "calls": []})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.tests[-1]["passed"] = report.passed

    def note(self, options: Any, outcome: str) -> None:
        """Adds a call to the test that is running."""
        body = {**(options.json_data or {}), **(options.extra_json or {})}
        asked = [_field(name, value) for name, value in body.items() if name not in NOT_SHOWN]
        call = {"call": f"{options.method.upper()} {options.url}", "asked": asked, "outcome": outcome}
        self.tests[-1]["calls"].append(call)


@contextmanager
def recorded_calls(note: Callable[[Any, str], None]) -> Iterator[None]:
    """Calls `note` with what each call of the client asked and what came of it, while the block runs."""
    whole, whole_async = openai.OpenAI.request, openai.AsyncOpenAI.request

    @functools.wraps(whole)
    def request(self: Any, cast_to: Any, options: Any, **how: Any) -> Any:
        try:
            answer = whole(self, cast_to, options, **how)
        except openai.APIStatusError as error:
            note(options, _refusal(error))
            raise
        note(options, describe(answer))
        return answer

    @functools.wraps(whole_async)
    async def request_async(self: Any, cast_to: Any, options: Any, **how: Any) -> Any:
        answer = await whole_async(self, cast_to, options, **how)
        note(options, describe(answer))
        return answer

    with (
        mock.patch.object(openai.OpenAI, "request", request),
        mock.patch.object(openai.AsyncOpenAI, "request", request_async),
    ):
        yield


def describe(answer: Any) -> str:
    """An answer in some words: how each choice ended, or what kind of thing it is."""
    if isinstance(answer, (openai.Stream, openai.AsyncStream)):
        return "a stream"
    choices = getattr(answer, "choices", None)
    if choices is None:
        return type(answer).__name__
    endings = ", ".join(choice.finish_reason for choice in choices)
    return f"{endings}; {answer.usage.completion_tokens} tokens"


def collect() -> Findings:
    recorder = Recorder()
    with recorded_calls(recorder.note):
        code = pytest.main([str(TESTS), "-q", "-p", "no:cacheprovider"], plugins=[recorder])
    return {
        "passed": code == 0 and all(test["passed"] for test in recorder.tests),
        "client": f"openai {importlib.metadata.version('openai')}",
        "tests": recorder.tests,
    }


def page(found: Mapping[str, Any]) -> str:
    calls = [["test", "passed", "call", "asked", "answer"]]
    for test in found["tests"]:
        name, passed = test["test"].removeprefix("test_").replace("_", " "), verdict(test["passed"])
        for call in test["calls"]:
            asked = cell(", ".join(call["asked"])) if call["asked"] else ""
            calls.append([name, passed, call["call"], asked, call["outcome"]])
            name, passed = "", ""
    num_passed = sum(test["passed"] for test in found["tests"])
    return (
        f"The client is {found['client']}, the server `lockstep serve` with the embedded model: {len(calls) - 1} calls "
        f"in {len(found['tests'])} tests of tests/engine/test_clients_openai.py, of which {num_passed} passed. A test "
        "says what its answers have to hold; a refusal is what it expects. Not shown are model, messages and prompts."
        f"\n\n{table(calls)}"
    )


def _field(name: str, value: Any) -> str:
    return f"{name}={value}" if isinstance(value, (bool, int, float, str)) else name


def _refusal(error: openai.APIStatusError) -> str:
    said = error.body.get("message", "") if isinstance(error.body, dict) else ""
    return f"{error.status_code} {error.code}: {said}"


PART = Part("openai", "OpenAI's client against the server", collect, page)
