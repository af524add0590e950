"""`lockstep chat`: the conversation that the engine sees, the slash commands, and Ctrl-C."""

from __future__ import annotations

import io
import signal
import sys

import pytest
from scripted_llm import ScriptedLLM

from lockstep.cli.main import main

pytestmark = pytest.mark.suite("cpu")

Streams = pytest.CaptureFixture[str]


def talk(monkeypatch: pytest.MonkeyPatch, *lines: str, arguments: tuple[str, ...] = ()) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return main(["chat", *arguments])


def contents(llm: ScriptedLLM, index: int) -> list[str]:
    return [message["content"] for message in llm.asked[index][0]]


def test_history_grows_until_reset(
    opened: list[ScriptedLLM], monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    assert talk(monkeypatch, "one", "", "two", "/reset", "three", arguments=("--system", "S")) == 0
    (llm,) = opened
    assert contents(llm, 0) == ["S", "one"]
    assert contents(llm, 1) == ["S", "one", "Paris.", "two"]
    assert contents(llm, 2) == ["S", "three"]
    assert [message["role"] for message in llm.asked[1][0]] == ["system", "user", "assistant", "user"]
    assert llm.closed
    assert capsys.readouterr().out == "Paris.\n" * 3


def test_system_command_starts_again(opened: list[ScriptedLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    assert talk(monkeypatch, "one", "/system You are a poet.", "two", "/system", "three", "/quit", "four") == 0
    (llm,) = opened
    assert [contents(llm, index) for index in range(len(llm.asked))] == [
        ["one"],
        ["You are a poet.", "two"],
        ["three"],
    ]


def test_help_and_unknown_commands(
    opened: list[ScriptedLLM], monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    assert talk(monkeypatch, "/help", "/rest") == 0
    err = capsys.readouterr().err
    assert "/system TEXT" in err and "unknown command '/rest'; did you mean '/reset'?" in err
    assert opened[0].asked == []


def test_default_sampling(opened: list[ScriptedLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    assert talk(monkeypatch, "one") == 0
    params = opened[0].asked[0][1]
    assert (params.temperature, params.max_tokens) == (0.7, 1024)


def test_control_c_stops_the_answer_only(
    opened: list[ScriptedLLM], monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    before = signal.getsignal(signal.SIGINT)
    pressed: list[int] = []

    def press_once(count: int) -> None:
        if count == 2 and not pressed:
            pressed.append(count)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ScriptedLLM, "on_token", staticmethod(press_once))
    assert talk(monkeypatch, "one", "two") == 0
    (llm,) = opened
    out, err = capsys.readouterr()
    assert out == "Paris\nParis.\n"
    assert "stopped" in err
    assert llm.ended_early == 1
    assert contents(llm, 1) == ["one", "Paris", "two"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_control_c_leaves(opened: list[ScriptedLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    def press_twice(count: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ScriptedLLM, "on_token", staticmethod(press_twice))
    assert talk(monkeypatch, "one", "two") == 130
    assert opened[0].closed and len(opened[0].asked) == 1


def test_a_refused_question_leaves_the_conversation_as_it_was(
    opened: list[ScriptedLLM], monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    assert talk(monkeypatch, "1", "2", "3", "4", "/reset", "5") == 0
    (llm,) = opened
    assert "the prompt is longer than the context (64 tokens) (/reset starts again)" in capsys.readouterr().err
    assert [contents(llm, index)[-1] for index in range(len(llm.asked))] == ["1", "2", "3", "5"]
    assert contents(llm, 3) == ["5"]
