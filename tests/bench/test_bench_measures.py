"""The commands, on a tiny random model: what they print, write and return."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lockstep.cli.main import main

pytestmark = pytest.mark.suite("cpu")

Streams = pytest.CaptureFixture[str]
SMALL = ["--dtype", "float32", "--max-total-tokens", "2048", "--threads", "1"]


def measured(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    assert main(["bench", *arguments, *SMALL, "--json", str(out)]) == 0
    result: dict[str, Any] = json.loads(out.read_text())
    assert result["benchmark"] == arguments[0]
    assert result["machine"]["devices"] and "load_average" in result["machine"]
    return result


def figures(result: dict[str, Any]) -> dict[str, Any]:
    return {figure["name"]: figure for figure in result["results"]["figures"]}


def test_throughput(model: Path, tmp_path: Path, capsys: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/where/lockstep", "bench", "throughput", "a b"])
    shape = ["--num-requests", "5", "--input-tokens", "20", "--output-tokens", "6", "--repeats", "2"]
    result = measured(tmp_path, "throughput", str(model), *shape, "--seed", "3")
    assert result["command"] == "lockstep bench throughput 'a b'"
    assert result["workload"] == {
        "seed": 3,
        "num_requests": 5,
        "input_tokens": 20,
        "output_tokens": 6,
        "repeats": 2,
    }
    found = figures(result)
    rates, times = (found[name]["contenders"]["lockstep"]["values"] for name in ("output", "whole batch"))
    assert [rate * seconds for rate, seconds in zip(rates, times, strict=True)] == pytest.approx([30, 30])
    totals = found["prompt and output"]["contenders"]["lockstep"]["values"]
    assert [rate * seconds for rate, seconds in zip(totals, times, strict=True)] == pytest.approx([130, 130])
    steps, rows = (found[name]["contenders"]["lockstep"]["median"] for name in ("steps", "tokens per step"))
    assert steps * rows == pytest.approx(130)
    out = capsys.readouterr().out
    for part in ("throughput: llama, float32 (seed 3, num requests 5", "output, tokens/s", "GiB", "torch "):
        assert part in out


def test_throughput_of_a_file(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    path.write_text('{"prompt": "Hello", "max_tokens": 4}\n{"prompt_token_ids": [5, 6, 7]}\n')
    result = measured(
        tmp_path, "throughput", str(model), "--workload", str(path), "--output-tokens", "2", "--repeats", "1"
    )
    found = figures(result)
    rate, seconds = (found[name]["contenders"]["lockstep"]["median"] for name in ("output", "whole batch"))
    assert rate * seconds == pytest.approx(6)


def test_latency_compared(model: Path, tmp_path: Path, capsys: Streams) -> None:
    shape = ["--batch-size", "2", "--input-tokens", "64", "--output-tokens", "5", "--repeats", "3"]
    result = measured(tmp_path, "latency", str(model), *shape, "--compare", "transformers")
    found = figures(result)
    for name in ("time to first token", "decode", "between tokens, p50"):
        own, other = found[name]["contenders"]["lockstep"], found[name]["contenders"]["transformers"]
        assert len(own["values"]) == len(other["values"]) == 3
        ratios = [a / b for a, b in zip(own["values"], other["values"], strict=True)]
        better = ratios if found[name]["higher_is_better"] else [1 / ratio for ratio in ratios]
        assert found[name]["advantage"]["median"] == pytest.approx(sorted(better)[1])
    assert found["decode"]["target"] == "at least 2 times"
    assert found["decode"]["reached"] == (found["decode"]["advantage"]["median"] >= 2)
    assert found["cached / uncached"]["target"] is None, "64 tokens are too few for the target"
    assert result["results"]["first_token_agreement"] == 1
    assert "first tokens that agree: 100%" in capsys.readouterr().out


def test_latency_of_one_token_and_a_long_prompt(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    found = figures(
        measured(
            tmp_path,
            "latency",
            str(tiny_models["llama"]),
            *["--input-tokens", "240", "--output-tokens", "1", "--repeats", "1"],
        )
    )
    assert "decode" not in found and "between tokens, p50" not in found
    cold, warm, share = (
        found[name]["contenders"]["lockstep"]["median"]
        for name in ("time to first token", "the same, prompt cached", "cached / uncached")
    )
    assert share == pytest.approx(warm / cold)


def test_startup(model: Path, tmp_path: Path) -> None:
    result = measured(tmp_path, "startup", str(model), "--repeats", "1")
    parts = {name: found["contenders"]["lockstep"]["median"] for name, found in figures(result).items()}
    whole = parts["process start to first token"]
    assert whole == pytest.approx(
        parts["loading the model"]
        + parts["first token of a loaded model"]
        + parts["interpreter, imports, output"]
    )
    assert min(parts.values()) > 0 and parts["process start to exit"] > whole
    assert figures(result)["process start to first token"]["target"] == "at most 6 s"


@pytest.mark.parametrize("measure", ["throughput", "latency", "startup"])
def test_a_model_that_is_not_there(measure: str, capsys: Streams) -> None:
    assert main(["bench", measure, "absent.gguf"]) == 2
    err = capsys.readouterr().err
    assert "absent.gguf: no such directory or file" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["throughput", "--compare", "transformer"], "'transformer' is not"),
        (["latency", "--batch-size", "0"], "0 is not in the range"),
        (["serve", "--rate", "0"], "is not in the range"),
        (["serve", "--rate", "1", "--concurrency", "2"], "--rate and --concurrency exclude each other"),
        (["serve", "m.gguf", "--url", "http://127.0.0.1:1"], "belong to the server that --url names"),
        (
            ["throughput", "--workload", __file__, "--num-requests", "3"],
            "--num-requests describes random prompts",
        ),
        (["throughput", "--workload", __file__], "line 1: not valid JSON"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], line: str, capsys: Streams) -> None:
    assert main(["bench", *arguments]) == 2
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == 1


def test_a_result_that_cannot_be_written(model: Path, tmp_path: Path, capsys: Streams) -> None:
    out = tmp_path / "absent" / "out.json"
    shape = ["--num-requests", "1", "--input-tokens", "4", "--output-tokens", "2", "--repeats", "1"]
    assert main(["bench", "throughput", str(model), *shape, *SMALL, "--json", str(out)]) == 2
    streams = capsys.readouterr()
    assert f"--json {out} cannot be written" in streams.err
    assert "output, tokens/s" in streams.out, "the table was printed before"
