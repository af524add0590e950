"""`lockstep run`: what reaches the engine, what reaches the two streams, and the exit code."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from scripted_llm import ScriptedLLM

from lockstep.cli.answer import Answer
from lockstep.cli.main import main
from lockstep.config import Given
from lockstep.core.clock import ManualClock
from lockstep.core.errors import EngineDead, LockstepError, ModelFileError, OutOfMemory, PlacementError
from lockstep.core.output import CompletionDelta, RequestOutput
from lockstep.core.sampling import Grammar
from lockstep.engine.llm import LLM
from lockstep.native import extension, summary

pytestmark = pytest.mark.suite("cpu")

Streams = pytest.CaptureFixture[str]


def test_answer_on_stdout_figures_on_stderr(opened: list[ScriptedLLM], capsys: Streams) -> None:
    assert main(["run", "Capital of France?"]) == 0
    out, err = capsys.readouterr()
    assert out == "Paris.\n"
    assert "7 prompt tokens (4 cached) · 3 new" in err and "first token after" in err
    (llm,) = opened
    assert llm.closed
    messages, params = llm.asked[0]
    assert messages == [{"role": "user", "content": "Capital of France?"}]
    assert (params.temperature, params.max_tokens, params.grammar, params.seed) == (0.0, 512, None, None)


def test_a_length_is_cut_to_what_fits_only_where_nobody_named_one(
    opened: list[ScriptedLLM], monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    monkeypatch.setattr(ScriptedLLM, "room", 100)
    assert main(["run", "x"]) == 0
    assert opened[0].asked[0][1].max_tokens is None
    assert main(["run", "x", "--max-tokens", "512"]) == 2
    assert "error: max_tokens 512 does not fit" in capsys.readouterr().err
    assert opened[1].asked == []


@pytest.mark.parametrize(
    "arguments", [["run", ""], ["run", " \n"], ["run", "-"], ["run", "", "--raw"]], ids=repr
)
def test_an_empty_prompt_is_a_mistake(
    opened: list[ScriptedLLM], monkeypatch: pytest.MonkeyPatch, capsys: Streams, arguments: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(arguments) == 2
    reason = "standard input holds no prompt" if "-" in arguments else "the prompt is empty"
    assert capsys.readouterr().err.startswith(f"error: {reason}")
    assert opened == [], "the model need not be loaded to see it"


def test_a_model_that_cannot_converse(
    opened: list[ScriptedLLM], monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    monkeypatch.setattr(ScriptedLLM, "chat_template", None)
    assert main(["run", "x"]) == 2
    err = capsys.readouterr().err
    assert "scripted has no chat template" in err and "--raw" in err and "--chat-template FILE" in err
    assert main(["chat"]) == 2
    err = capsys.readouterr().err
    assert "--chat-template FILE" in err and "--raw" not in err
    assert main(["run", "x", "--raw"]) == 0


def test_json_is_one_object(opened: list[ScriptedLLM], capsys: Streams) -> None:
    assert main(["run", "x", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err == ""
    assert (
        report["text"] == "Paris." and report["token_ids"] == [11, 12, 13] and report["finish_reason"] == "stop"
    )
    assert report["usage"] == {
        "prompt_tokens": 7,
        "cached_tokens": 4,
        "completion_tokens": 3,
        "total_tokens": 10,
    }
    timings = report["timings"]
    assert set(timings) == {"load_s", "ttft_s", "decode_tokens_per_s", "total_s"}
    assert timings["total_s"] >= timings["load_s"] + timings["ttft_s"]


def test_options_reach_the_engine_with_their_source(opened: list[ScriptedLLM]) -> None:
    arguments = ["run", "x", "m.gguf", "--tp", "2", "--strict-kernels", "--dtype", "float32"]
    assert main([*arguments, "--force-kernel", "a=b", "--force-kernel", "c=d"]) == 0
    written = {
        "model": "m.gguf",
        "tp": 2,
        "strict_kernels": True,
        "dtype": "float32",
        "force_kernel": ("a=b", "c=d"),
    }
    assert opened[0].options == {name: Given(value, "command line") for name, value in written.items()}


def test_sampling_options_reach_the_engine(opened: list[ScriptedLLM]) -> None:
    arguments = (
        "run x --temperature 0.5 --top-p 0.9 --top-k 5 --min-p 0.1 --seed 3 --max-tokens 9 --stop A --stop B"
    )
    assert main(arguments.split()) == 0
    params = opened[0].asked[0][1]
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 5, 0.1)
    assert (params.seed, params.max_tokens, params.stop) == (3, 9, ("A", "B"))


def test_grammars(opened: list[ScriptedLLM], tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    assert main(["run", "x", "--json-schema", str(schema)]) == 0
    assert main(["run", "x", "--regex", "[0-9]+"]) == 0
    assert main(["run", "x", "--ebnf", str(schema)]) == 0
    grammars = [llm.asked[0][1].grammar for llm in opened]
    assert grammars == [
        Grammar("json_schema", '{"type": "object"}'),
        Grammar("regex", "[0-9]+"),
        Grammar("ebnf", '{"type": "object"}'),
    ]


@pytest.mark.parametrize("option", ["--json-schema", "--ebnf"])
def test_a_grammar_that_is_no_text(tmp_path: Path, capsys: Streams, option: str) -> None:
    path = tmp_path / "grammar"
    path.write_bytes(b"\xff\xfe")
    assert main(["run", "x", option, str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {option} {path} cannot be read") and said.count("\n") == 1


def test_a_prompt_that_is_no_text(opened: list[ScriptedLLM], capsys: Streams) -> None:
    """What a shell hands on of bytes that are no UTF-8."""
    for arguments in (["run", "caf\udcff"], ["run", "x", "--system", "\udcfe"]):
        assert main(arguments) == 2
        assert capsys.readouterr().err.startswith("error: the prompt is not valid UTF-8")
    assert not opened


def test_system_raw_and_standard_input(
    opened: list[ScriptedLLM], monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    assert main(["run", "x", "--system", "Be brief."]) == 0
    assert main(["run", "Once upon", "--raw"]) == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    assert main(["run", "-"]) == 0
    asked = [llm.asked[0][0] for llm in opened]
    assert asked[0][0] == {"role": "system", "content": "Be brief."}
    assert asked[1] == "Once upon"
    assert asked[2] == [{"role": "user", "content": "from a pipe\n"}]
    assert main(["run", "x", "--raw", "--system", "y"]) == 2
    assert "--system has no place in a --raw prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ModelFileError("no such file: m.gguf"), 2),
        (OutOfMemory("needs 2 GiB, available 1 GiB"), 2),
        (EngineDead("the engine process was killed"), 1),
        (PlacementError("a reduction is missing"), 1),
    ],
)
def test_errors_are_one_line(
    opened: list[ScriptedLLM], monkeypatch: pytest.MonkeyPatch, capsys: Streams, error: LockstepError, code: int
) -> None:
    monkeypatch.setattr(ScriptedLLM, "opening_failure", error)
    assert main(["run", "x"]) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {error}\n")


def test_an_engine_that_gives_up_is_a_failure(
    opened: list[ScriptedLLM], monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    monkeypatch.setattr(ScriptedLLM, "failure", EngineDead("the worker of rank 1 is gone"))
    assert main(["run", "x"]) == 1
    assert "error: the worker of rank 1 is gone" in capsys.readouterr().err
    assert opened[0].closed


def test_a_bug_is_one_line_too_unless_debugging(
    opened: list[ScriptedLLM], monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    monkeypatch.setattr(ScriptedLLM, "opening_failure", ZeroDivisionError("division by zero"))
    assert main(["run", "x"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: internal error: ZeroDivisionError: division by zero") and err.count("\n") == 1
    monkeypatch.setenv("LOCKSTEP_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["run", "x"])


def test_control_c_ends_quietly(
    opened: list[ScriptedLLM], monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    def interrupt(count: int) -> None:
        if count == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ScriptedLLM, "on_token", staticmethod(interrupt))
    assert main(["run", "x"]) == 130
    out, err = capsys.readouterr()
    assert out == "Pa" and err.strip() == ""
    assert opened[0].closed


def test_timings_against_a_manual_clock() -> None:
    clock = ManualClock()
    answer = Answer(clock)

    def outputs() -> object:
        for at_s, total, text in ((0.5, 2, "ab"), (1.0, 3, ""), (2.5, 10, "c")):
            clock.advance(at_s - clock.now_s())
            yield RequestOutput("r", (CompletionDelta(0, text, (1,)),), 5, 0, total, total == 10)

    assert list(answer.follow(outputs())) == ["ab", "c"]  # type: ignore[arg-type]
    assert answer.ttft_s == 0.5
    assert answer.decode_tokens_per_s == pytest.approx((10 - 2) / (2.5 - 0.5))
    assert answer.report(load_s=1.5)["timings"]["total_s"] == pytest.approx(4.0)
    assert "4.0 tokens/s · first token after 0.50 s · loaded in 1.50 s" in answer.closing_line(1.5)


def test_timings_of_one_token_have_no_rate() -> None:
    answer = Answer(ManualClock())
    list(
        answer.follow(
            [RequestOutput("r", (CompletionDelta(0, "a", (1,), finish_reason="length"),), 5, 0, 1, True)]
        )
    )
    assert answer.decode_tokens_per_s is None
    assert (
        answer.closing_line()
        == "5 prompt tokens (0 cached) · 1 new · first token after 0.00 s · ended by length"
    )


def test_an_error_in_a_delta_is_raised() -> None:
    broken = RequestOutput(
        "r", (CompletionDelta(0, error="out of pages", finish_reason="error"),), 5, 0, 0, True
    )
    with pytest.raises(EngineDead, match="out of pages"):
        list(Answer().follow([broken]))


def test_native_kernels_are_named_where_they_serve(
    opened: list[ScriptedLLM], monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    assert main(["run", "hi"]) == 0
    assert capsys.readouterr().err.rstrip().endswith(" · native kernels: scripted")
    monkeypatch.setattr(ScriptedLLM, "native_kernels", None)
    assert main(["run", "hi"]) == 0
    assert "native" not in capsys.readouterr().err


def test_an_engine_names_native_kernels_where_they_serve() -> None:
    small: dict[str, Any] = {"device": "cpu", "max_total_tokens": 512, "context_length": 64}
    with LLM(**small) as llm:
        assert llm.native_kernels == summary()
    if extension() is not None:
        with LLM(force_kernel=("decoder_forward=native_scalar",), **small) as llm:
            assert llm.native_kernels == "native kernels: scalar"
    with LLM(force_kernel=("*=reference",), **small) as llm:
        assert llm.native_kernels is None or extension() is None


@pytest.mark.parametrize("command", ["run hi", "chat"])
def test_a_tokenizer_that_was_left_out_is_said_to_be(command: str, capsys: Streams) -> None:
    assert main([*command.split(), "--skip-tokenizer-init"]) == 2
    err = capsys.readouterr().err
    assert "--skip-tokenizer-init leaves nothing to read text with" in err and "template" not in err
