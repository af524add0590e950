"""The load generator against a server with known pauses."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_completions_server import FakeCompletions

from lockstep.bench.http_load import LoadGenerator
from lockstep.bench.processes import lockstep_command, running_server
from lockstep.bench.workload import Job
from lockstep.cli.main import main
from lockstep.config import Given
from lockstep.core.errors import ConfigError, EngineDead

pytestmark = pytest.mark.suite("cpu", exclusive=True)

Streams = pytest.CaptureFixture[str]


def serve(server: FakeCompletions, tmp_path: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    out = tmp_path / "out.json"
    assert main(["bench", "serve", "--url", server.url, *arguments, "--json", str(out)]) == code
    result: dict[str, Any] = json.loads(out.read_text())
    return result["results"]


def test_times_are_the_servers_pauses(fake_server: FakeCompletions, tmp_path: Path) -> None:
    fake_server.first_s, fake_server.gap_s = 0.1, 0.03
    shape = ["--num-requests", "4", "--concurrency", "2", "--input-tokens", "7", "--output-tokens", "5"]
    found = serve(fake_server, tmp_path, *shape)
    # A sleep is never shorter than asked; how much longer depends on who else uses the machine.
    assert 0.1 <= found["ttft_s"]["p50"] < 0.3
    assert 0.03 <= found["itl_s"]["p50"] < 0.1
    assert 0.22 <= found["e2e_s"]["p50"] < 0.7
    assert 0.44 <= found["seconds"] < 1.5, "two after two"
    assert (found["num_completed"], found["num_failed"]) == (4, 0)
    assert (found["num_prompt_tokens"], found["num_output_tokens"]) == (28, 20)
    assert found["output_tokens_per_s"] == pytest.approx(20 / found["seconds"])
    assert fake_server.most_at_once == 2


def test_what_is_sent(fake_server: FakeCompletions, tmp_path: Path) -> None:
    serve(fake_server, tmp_path, "--num-requests", "3", "--input-tokens", "7", "--output-tokens", "5")
    warm_up, *bodies = fake_server.bodies
    assert warm_up["prompt"] == "Hello"
    assert len({tuple(body["prompt"]) for body in bodies}) == 3
    for body in bodies:
        assert len(body["prompt"]) == 7 and max(body["prompt"]) < fake_server.vocab_size
        assert body | {"prompt": 0} == {
            "model": "fake",
            "prompt": 0,
            "max_tokens": 5,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def test_texts_may_hold_ends_of_lines(fake_server: FakeCompletions, tmp_path: Path) -> None:
    """Unicode has more of them than streams of events."""
    fake_server.letter = "\u2028\x85\u00e9"
    found = serve(fake_server, tmp_path, "--num-requests", "2", "--input-tokens", "7", "--output-tokens", "3")
    assert (found["num_completed"], found["num_failed"], found["num_output_tokens"]) == (2, 0, 6)


def test_a_rate_does_not_wait_for_answers(fake_server: FakeCompletions, tmp_path: Path) -> None:
    fake_server.first_s = 0.8
    found = serve(
        fake_server, tmp_path, "--num-requests", "10", "--rate", "100", "--output-tokens", "1", "--seed", "1"
    )
    assert found["num_completed"] == 10
    assert fake_server.most_at_once >= 8
    arrived_s = fake_server.arrived_s[1:]
    assert 0.02 < arrived_s[-1] - arrived_s[0] < 0.7


def test_a_file_of_texts_needs_no_vocabulary(
    fake_server: FakeCompletions, tmp_path: Path, capsys: Streams
) -> None:
    fake_server.vocab_size = None
    path = tmp_path / "jobs.jsonl"
    path.write_text('{"prompt": "one", "max_tokens": 2}\n{"prompt": "two", "max_tokens": 3}\n')
    assert serve(fake_server, tmp_path, "--workload", str(path))["num_output_tokens"] == 5
    assert sorted(body["prompt"] for body in fake_server.bodies[1:]) == ["one", "two"]
    assert main(["bench", "serve", "--url", fake_server.url]) == 2
    assert "give the prompts with --workload" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        ("status", "status 503: "),
        ("event", "in the stream: "),
        ("cut", "the stream ended without [DONE]"),
        ("json", "an event that is not JSON"),
    ],
)
def test_a_failed_request_is_told_and_the_exit_code_is_1(
    failure: str, error: str, fake_server: FakeCompletions, tmp_path: Path, capsys: Streams
) -> None:
    fake_server.fails_on, fake_server.failure = 9, failure
    path = tmp_path / "jobs.jsonl"
    path.write_text('{"prompt_token_ids": [8]}\n{"prompt_token_ids": [9]}\n{"prompt_token_ids": [10]}\n')
    found = serve(fake_server, tmp_path, "--workload", str(path), "--output-tokens", "4", code=1)
    assert (found["num_completed"], found["num_failed"], found["num_output_tokens"]) == (2, 1, 8)
    assert f"failed: {error}" in capsys.readouterr().out


def test_all_failed_still_reports(fake_server: FakeCompletions, tmp_path: Path) -> None:
    fake_server.fails_on, fake_server.failure = 9, "status"
    path = tmp_path / "jobs.jsonl"
    path.write_text('{"prompt_token_ids": [9]}\n')
    found = serve(fake_server, tmp_path, "--workload", str(path), code=1)
    assert (found["num_completed"], found["ttft_s"], found["output_tokens_per_s"]) == (0, None, 0)


def test_a_key_comes_from_the_environment(
    fake_server: FakeCompletions, tmp_path: Path, capsys: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_server.api_key = "s3cret"
    shape = ["--num-requests", "1", "--output-tokens", "1"]
    assert main(["bench", "serve", "--url", fake_server.url, *shape]) == 2
    assert "set LOCKSTEP_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("LOCKSTEP_API_KEY", "s3cret")
    assert serve(fake_server, tmp_path, *shape)["num_completed"] == 1
    assert "s3cret" not in (tmp_path / "out.json").read_text()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense", "http://[::"])
def test_nobody_answers(url: str, capsys: Streams) -> None:
    assert main(["bench", "serve", "--url", url]) == 2
    err = capsys.readouterr().err
    assert f"no server answers at {url}" in err and err.count("\n") == 1


def test_httpx_missing_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Streams) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9"]) == 2
    assert "pip install 'lockstep-engine[bench]'" in capsys.readouterr().err


def test_a_server_that_goes_away_is_a_failure(fake_server: FakeCompletions) -> None:
    async def load() -> list[str | None]:
        async with LoadGenerator("http://127.0.0.1:9") as generator:
            return [found.error for found in await generator.run("m", [Job("a", 1)] * 2, concurrency=None)]

    errors = asyncio.run(load())
    assert len(errors) == 2 and all(error is not None and "ConnectError" in error for error in errors)


def test_a_page_that_is_no_model_server(fake_server: FakeCompletions) -> None:
    async def ask() -> None:
        async with LoadGenerator(fake_server.url + "/elsewhere") as generator:
            await generator.served_model()

    with pytest.raises(ConfigError, match="OpenAI-compatible"):
        asyncio.run(ask())


def test_command_lines_say_what_was_given() -> None:
    options = {
        "model": Given("-odd name", "command line"),
        "disable_radix_cache": Given(True, "command line"),
        "force_kernel": Given(("linear=torch", "rope=torch"), "command line"),
        "tp": Given(2, "command line"),
    }
    command = lockstep_command("run", options, flags=["--json"], arguments=["A question?"])
    assert command[0] == sys.executable and command[3:] == [
        "run",
        "--json",
        "--disable-radix-cache",
        "--force-kernel=linear=torch",
        "--force-kernel=rope=torch",
        "--tp=2",
        "--",
        "A question?",
        "-odd name",
    ]


ANNOUNCE_AND_WAIT = """
import time
print('loading'); print('Lockstep serves m at http://host:1', flush=True); time.sleep(60)
"""


def test_a_server_lives_as_long_as_the_measure() -> None:
    with running_server([sys.executable, "-c", ANNOUNCE_AND_WAIT]) as url:
        assert url == "http://host:1"


def test_a_server_that_does_not_start() -> None:
    command = [sys.executable, "-c", "import sys; print('loading'); sys.exit(3)"]
    with pytest.raises(EngineDead, match="exit code 3"), running_server(command):
        pass


def test_a_server_of_its_own(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    shape = ["--num-requests", "6", "--concurrency", "3", "--input-tokens", "10", "--output-tokens", "4"]
    small = ["--dtype", "float32", "--max-total-tokens", "2048", "--threads", "1"]
    assert main(["bench", "serve", str(model), *shape, *small, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["model"]["name"] == "llama"
    assert found["results"]["num_completed"] == 6
    assert (found["results"]["num_prompt_tokens"], found["results"]["num_output_tokens"]) == (60, 24)
