"""`lockstep explain`, `serve` and `bench`: what is printed and what is called."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted_llm import CARD, ScriptedLLM

from lockstep.cli.main import main
from lockstep.config import Given, ModelFacts, ServerOptions, gather, resolve
from lockstep.config.components import OPTIONS
from lockstep.core.capabilities import Capabilities
from lockstep.executor.memory import MemoryLine

pytestmark = pytest.mark.suite("cpu")

Streams = pytest.CaptureFixture[str]

FACTS = ModelFacts(
    name="small",
    architecture="LlamaForCausalLM",
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_size=32,
    vocab_size=64,
    context_length=512,
    num_parameters=1000,
    weight_bytes=4000,
    stored_dtype="float32",
)
HOST = Capabilities(
    platform="cpu",
    device_type="cpu",
    device_name="a processor",
    memory_bytes=2**30,
    collective_backend="gloo",
)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    module = types.ModuleType(name)
    for attribute, value in attributes.items():
        setattr(module, attribute, value)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        monkeypatch,
        "lockstep.engine.opening",
        resolve_options=lambda options: resolve(gather(options), FACTS, HOST),
    )


@pytest.mark.usefixtures("resolved")
def test_explain_config_as_a_table(capsys: Streams) -> None:
    assert main(["explain", "config", "m", "--tp", "2", "--api-key", "s3cret"]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    for option in OPTIONS.values():
        assert ("MODEL" if option.positional else option.flag) in lines
    assert lines["--tp"].split()[1:] == ["2", "command", "line", "--tp"]
    assert "the model's own name" in lines["--served-model-name"]
    assert "s3cret" not in out and "(hidden)" in lines["--api-key"]


@pytest.mark.usefixtures("resolved")
def test_explain_config_as_json(capsys: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_THREADS", "5")
    assert main(["explain", "config", "--json"]) == 0
    decisions = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert list(decisions) == list(OPTIONS)
    assert decisions["threads"] == {
        "name": "threads",
        "value": 5,
        "source": "environment",
        "why": "from LOCKSTEP_THREADS",
    }


@pytest.mark.usefixtures("resolved")
def test_explain_config_refuses_what_cannot_work(capsys: Streams) -> None:
    assert main(["explain", "config", "--tp", "3"]) == 2
    assert capsys.readouterr().err == (
        "error: --tp 3 cannot share out 4 query heads and 2 KV heads; small takes --tp 1, 2 or 4\n"
    )


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (
            ("--force-kernel", "rms_norm=tritn"),
            "--force-kernel rms_norm=tritn names no kernel; did you mean 'triton'?",
        ),
        (("--force-kernel", "rms_nrm=triton"), "--force-kernel names unknown operator 'rms_nrm'"),
        (
            ("--attention-backend", "flashinfr"),
            "unknown attention backend 'flashinfr'; did you mean 'flashinfer'?",
        ),
    ],
)
def test_explain_config_refuses_names_that_no_kernel_has(
    name: tuple[str, str], error: str, capsys: Streams
) -> None:
    assert main(["explain", "config", *name]) == 2
    assert capsys.readouterr().err.startswith(f"error: {error}")


def test_explain_memory(opened: list[ScriptedLLM], monkeypatch: pytest.MonkeyPatch, capsys: Streams) -> None:
    lines = [
        MemoryLine("others", 2**30, "other programs", is_own=False),
        MemoryLine("weights", 3 * 2**20, "float32"),
        MemoryLine("KV pool", 2**20, "256 pages"),
    ]
    monkeypatch.setattr(ScriptedLLM, "memory_report", lambda self, measure: lines * measure, raising=False)
    assert main(["explain", "memory"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert ["weights", "3.0", "MiB", "75%", "float32"] in rows
    assert ["others", "1.0", "GiB", "other", "programs"] in rows
    assert ["total", "4.0", "MiB"] in [row[:3] for row in rows]
    assert main(["explain", "memory", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[2] == {
        "name": "KV pool",
        "bytes": 2**20,
        "note": "256 pages",
        "is_own": True,
    }
    assert all(llm.closed for llm in opened)


class _Client:
    card = CARD
    native_kernels: str | None = "native kernels: scripted"

    def __init__(self, options: dict[str, Given]) -> None:
        self.options = options


def serving(monkeypatch: pytest.MonkeyPatch) -> list[tuple[_Client, ServerOptions]]:
    calls: list[tuple[_Client, ServerOptions]] = []

    async def serve(client: _Client, options: ServerOptions, *, on_ready: Callable[[str], None]) -> None:
        await asyncio.sleep(0)
        calls.append((client, options))
        on_ready(f"http://{options.host}:{options.port}")

    install(monkeypatch, "lockstep.engine.process_client", ProcessClient=_Client)
    install(monkeypatch, "lockstep.server.serve", serve=serve)
    return calls


def test_serve_prints_its_address(monkeypatch: pytest.MonkeyPatch, capsys: Streams) -> None:
    calls = serving(monkeypatch)
    monkeypatch.setenv("LOCKSTEP_API_KEY", "k")
    assert main(["serve", "m.gguf", "--port", "8123", "--tp", "2"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("Lockstep serves scripted at http://127.0.0.1:8123\n", "native kernels: scripted\n")
    ((client, options),) = calls
    assert (options.port, options.api_key) == (8123, "k")
    assert client.options["model"] == Given("m.gguf", "command line")
    assert client.options["tp"].value == 2


def test_serve_warns_when_anyone_may_use_it(monkeypatch: pytest.MonkeyPatch, capsys: Streams) -> None:
    serving(monkeypatch)
    assert main(["serve", "--host", "0.0.0.0"]) == 0
    assert "--api-key" in capsys.readouterr().err
    assert main(["serve", "--host", "0.0.0.0", "--api-key", "k"]) == 0
    assert capsys.readouterr().err == "native kernels: scripted\n"
    monkeypatch.setattr(_Client, "native_kernels", None)
    assert main(["serve"]) == 0
    assert capsys.readouterr().err == ""


def test_serve_on_a_taken_port(monkeypatch: pytest.MonkeyPatch, capsys: Streams) -> None:
    install(monkeypatch, "lockstep.engine.process_client", ProcessClient=_Client)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: port {port} on 127.0.0.1 is in use") and err.count("\n") == 1


_WORKLOADS: dict[str, dict[str, Any]] = {
    "throughput": {
        "num_requests": None,
        "input_tokens": None,
        "output_tokens": None,
        "workload": None,
        "repeats": 3,
        "compare": None,
    },
    "latency": {"batch_size": 1, "input_tokens": 128, "output_tokens": 128, "repeats": 5, "compare": None},
    "serve": {
        "url": None,
        "num_requests": None,
        "concurrency": None,
        "rate": None,
        "input_tokens": None,
        "output_tokens": None,
        "workload": None,
    },
    "startup": {"repeats": 3},
}


@pytest.mark.parametrize("measure", _WORKLOADS)
def test_bench_calls_the_measure_and_returns_its_code(measure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[dict[str, Given], dict[str, Any]]] = []

    def measured(options: dict[str, Given], **workload: Any) -> int:
        calls.append((options, workload))
        return 1

    install(monkeypatch, "lockstep.bench", __path__=[])
    install(monkeypatch, f"lockstep.bench.{measure}", main=measured)
    assert main(["bench", measure, "m", "--json", "out.json", "--threads", "1"]) == 1
    ((options, workload),) = calls
    assert options == {"model": Given("m", "command line"), "threads": Given(1, "command line")}
    seed = {} if measure == "startup" else {"seed": 0}
    assert workload == {**_WORKLOADS[measure], **seed, "json_out": Path("out.json")}
