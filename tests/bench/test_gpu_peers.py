"""Workloads that other engines run too: what is asked, what is measured, what is lost when a test fails, the tables."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from lockstep import LLM
from lockstep.bench.http_load import Exchange
from lockstep.bench.workload import Job
from lockstep.core.errors import ConfigError, LockstepError

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from gpu_peers import main
from peers.gpu_engine import InProcess, OutOfTime, limited, process_started_s
from peers.gpu_measures import Ceilings, Measurer
from peers.gpu_record import UNFINISHED, Record, brief
from peers.gpu_server import serving_figures
from peers.gpu_targets import GOALS, goals_table
from peers.gpu_workloads import WorkloadFile, byte_tokenizer

pytestmark = pytest.mark.suite("cpu", seconds=40)

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "vocab_size": 400,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
}
FILE = f"""
import os, time
MODELS = {{"tiny": {{"vocab_size": 258}}, "experts": {{"num_experts": 4}}, "mixture": {CONFIG}}}
"""
FILE += """
WORKLOADS = {
    "many": {"kind": "throughput"},
    "one": {"kind": "decode"},
    "long": {"kind": "prefill"},
    "shared": {"kind": "prefix", "temperature": 0.5},
    "online": {"kind": "serving"},
    "slow": {"kind": "decode"},
    "fatal": {"kind": "decode"},
}
PROMPTS = {
    "many": [[1, 2, 3], [4, 5]], "one": [[7] * 8], "long": [[9] * 40], "online": [[1, 2], [3, 4], [5, 6]],
    "shared": [[5] * 12 + [1, 2], [5] * 12 + [2, 1]],
}
ANSWERS = {"many": 6, "one": 5, "long": 1, "shared": 3, "online": 2}

def requests(name, warmup=False):
    if name == "slow": time.sleep(60)
    if name == "fatal": os._exit(9)
    shift = 100 if warmup else 0
    return [dict(prompt=[t + shift for t in p], max_tokens=ANSWERS[name]) for p in PROMPTS[name]]

def arrivals(count, rate): return [at / rate for at in range(count)]
def temperature(name): return WORKLOADS[name].get("temperature", 0.0)
def digest(name): return "sum-" + name
def stats(model): return dict(decode_weight_bytes_b1=1000, kv_bytes_per_token=10)
def prefill_flops(model, lengths): return 7 * sum(lengths)
"""


@pytest.fixture
def file(tmp_path: Path) -> WorkloadFile:
    (tmp_path / "workloads.py").write_text(FILE)
    return WorkloadFile(tmp_path / "workloads.py")


class Scripted:
    """An engine whose calls take 10 ms a prompt token that is not cached and 1 s a token of the longest answer."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, float]] = []
        self.cached: set[tuple[int, ...]] = set()

    def generate(self, jobs: Sequence[Job], temperature: float = 0.0) -> float:
        self.calls.append((sum(job.max_tokens for job in jobs), temperature))
        new = sum(len(job.prompt) for job in jobs if tuple(job.prompt)[:12] not in self.cached)
        self.cached |= {tuple(map(int, job.prompt[:12])) for job in jobs}
        return 0.01 * new + max(job.max_tokens for job in jobs)

    def flush(self) -> None:
        self.cached.clear()


def test_figures_follow_from_times(file: WorkloadFile) -> None:
    ceilings = Ceilings(1e6, copy_bytes_per_s=2000.0, gemm_flops_per_s=500.0)
    measurer = Measurer(Scripted(), file, "tiny", ceilings)
    many = measurer.measure(file.workload("many"))
    assert many["output_tokens_per_s"] == pytest.approx(12 / 6.05)
    assert many["total_tokens_per_s"] == pytest.approx(17 / 6.05)
    one = measurer.measure(file.workload("one"))
    assert one["ms_per_step"] == pytest.approx(1000) and one["first_token_s"] == pytest.approx(1.08)
    # 1000 bytes of weights and (8 + 5 / 2) tokens of 10 bytes, at 2000 bytes/s, against one second.
    assert one["fraction_of_weight_kv_floor"] == pytest.approx((1000 + 105) / 2000)
    long = measurer.measure(file.workload("long"))
    assert len(long["runs_s"]) == 5 and long["mfu_datasheet"] == pytest.approx(280 / 1.4 / 1e6)
    assert long["mfu_measured_gemm"] == pytest.approx(280 / 1.4 / 500)
    shared = measurer.measure(file.workload("shared"))
    assert shared["median_s"] == pytest.approx(3.28) and shared["primed_median_s"] == pytest.approx(3.0)
    assert shared["digest"] == "sum-shared"


def test_a_run_asks_for_the_workload_with_an_empty_cache_after_a_warm_up(file: WorkloadFile) -> None:
    engine = Scripted()
    figures = Measurer(engine, file, "tiny", Ceilings(1.0)).measure(file.workload("shared"))
    # A warm-up, three runs, and three that follow a request for the shared prefix alone.
    assert engine.calls == [(6, 0.5)] * 4 + [(1, 0.0), (6, 0.5)] * 3
    assert figures["runs_s"][0] == figures["runs_s"][1], "the second run found the first one's prefixes"


def test_long_workloads_run_three_times(file: WorkloadFile) -> None:
    class Slow(Scripted):
        def generate(self, jobs: Sequence[Job], temperature: float = 0.0) -> float:
            return super().generate(jobs, temperature) * scale

    runs = {}
    for scale in (1.0, 3.2, 10.0):  # 6.05 s a run, 19 s, and 60 s
        runs[scale] = len(
            Measurer(Slow(), file, "tiny", Ceilings(1.0)).measure(file.workload("many"))["runs_s"]
        )
    assert runs == {1.0: 5, 3.2: 4, 10.0: 3}


def test_a_floor_needs_weights_that_each_step_reads(file: WorkloadFile) -> None:
    measurer = Measurer(Scripted(), file, "experts", Ceilings(1.0, copy_bytes_per_s=1.0))
    two = [Job((1,), 5), Job((2,), 5)]
    assert measurer._floor(two[:1], 1.0) and not measurer._floor(two, 1.0)


def test_what_the_file_lacks_is_said(file: WorkloadFile, tmp_path: Path) -> None:
    assert file.names() == ["many", "one", "long", "shared", "slow", "fatal"]
    with pytest.raises(ConfigError, match="did you mean 'shared'"):
        file.workload("sharde")
    with pytest.raises(ConfigError, match="did you mean 'experts'"):
        file.write_model("expert", tmp_path)
    (tmp_path / "half.py").write_text("MODELS = {}\n")
    with pytest.raises(ConfigError, match="lacks WORKLOADS, requests"):
        WorkloadFile(tmp_path / "half.py")
    with pytest.raises(ConfigError, match=r"no Python file"):
        WorkloadFile(tmp_path / "none.py")
    written = file.write_model("tiny", tmp_path) / "config.json"
    assert json.loads(written.read_text()) == {"vocab_size": 258}


def test_a_real_engine_runs_every_kind_and_starts_again_after_a_failure(
    file: WorkloadFile, model: Path
) -> None:
    opened: list[LLM] = []

    def open_llm() -> LLM:
        opened.append(LLM(str(model), threads=1, page_size=4, context_length=128))
        return opened[-1]

    engine = InProcess(open_llm)
    try:
        measurer = Measurer(engine, file, "tiny", Ceilings(1e12))
        for name in file.names()[:4]:
            assert measurer.measure(file.workload(name))["median_s"] > 0
        steps = opened[0].stats()
        # The runs of "shared" found its prefix only where it was asked for before.
        assert 0 < steps.num_cached_tokens < steps.num_prompt_tokens / 4
        engine.close()
        assert engine.generate([Job((1, 2), 3)]) > 0 and len(opened) == 2
    finally:
        engine.close()


def test_a_limit_ends_what_takes_longer_and_nothing_after_it() -> None:
    with pytest.raises(OutOfTime, match=r"0\.05 s"), limited(0.05):
        time.sleep(5)
    with limited(0.05):
        pass
    time.sleep(0.1)
    assert 0 < time.time() - process_started_s() < 24 * 3600


@pytest.mark.parametrize("state", ["warm", "cold"])
def test_the_report_sets_results_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], state: str
) -> None:
    def result(engine: str, cache_state: str, start_s: float, **tests: dict[str, object]) -> Path:
        path = tmp_path / f"{engine}.json"
        startup = {"cache_state": cache_state, "process_start_to_first_token_s": start_s}
        path.write_text(json.dumps({"engine": engine, "model": "m", "startup": startup, "tests": tests}))
        return path

    own = result(
        "lockstep",
        "warm",
        5.0,
        decode={"kind": "decode", "digest": "d", "ms_per_step": 4.0},
        many={"kind": "throughput", "digest": "t", "output_tokens_per_s": 300.0},
        other={"kind": "throughput", "digest": "mine", "output_tokens_per_s": 1.0},
        broken={"error": "OutOfMemory: no"},
        alone={"kind": "prefill", "digest": "p", "input_tokens_per_s": 9.0, "mfu_datasheet": 0.5},
    )
    peer = result(
        "vllm",
        state,
        30.0,
        decode={"kind": "decode", "digest": "d", "ms_per_step": 6.0},
        many={"kind": "throughput", "digest": "t", "output_tokens_per_s": 200.0},
        other={"kind": "throughput", "digest": "theirs", "output_tokens_per_s": 1.0},
        broken={"kind": "throughput", "digest": "b", "output_tokens_per_s": 1.0},
        alone={"error": "it failed"},
    )
    assert main(["report", "--ours", str(own), "--peer", str(peer), "--out", str(tmp_path / "t.md")]) == 0
    rows = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines() if "|" in line}
    # A start with full caches is compared with one of the same kind only.
    assert rows["process start (caches warm)"].endswith("| 6.00 |" if state == "warm" else "|  |")
    assert rows["decode"].endswith("| 1.50 |") and rows["many"].endswith("| 1.50 |")
    assert "digests differ" in rows["other"] and "OutOfMemory" in rows["broken"]
    assert "50%" in rows["alone"] and rows["alone"].endswith("|  |")
    assert "## m" in (tmp_path / "t.md").read_text()
    assert main(["report", "--ours", str(tmp_path / "absent.json")]) == 1


def test_a_record_goes_on_where_its_process_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = Record(tmp_path / "new" / "r.json", engine="e")
    record.put(
        "first", {"kind": "decode", "runs_s": [1.0], "ms_per_step": 1.23456, "ttft_ms": {"p99": 2.0, "n": 3}}
    )
    record.begin("second")
    again = Record(tmp_path / "new" / "r.json", engine="another")
    assert again.content["engine"] == "e"
    assert again.missing(["second", "third", "first"]) == ["third"]
    assert again.content["tests"]["second"] == {"error": UNFINISHED}
    assert capsys.readouterr().out == 'RESULT first {"ms_per_step": 1.235, "ttft_ms": {"p99": 2.0}}\n'
    assert brief({"skipped": "out of time", "x": "y", "num_steps": 3}) == {
        "skipped": "out of time",
        "num_steps": 3,
    }


def test_a_test_that_fails_costs_no_other_one(
    file: WorkloadFile, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One is never answered in time, one ends its process: the others are measured all the same."""
    out = tmp_path / "ours.json"
    command = ["ours", "--workloads", str(tmp_path / "workloads.py"), "--model", "mixture", "--out", str(out)]
    command += ["--engine-args", '{"device": "cpu", "threads": 1, "max_total_tokens": 1024}', "--tag", "t"]
    assert (
        main([*command, "--tests", "one,slow,shared,fatal,many", "--limit-s", "8", "--cache-state", "cold"])
        == 0
    )
    result = json.loads(out.read_text())
    assert list(result["tests"]) == ["one", "slow", "shared", "fatal", "many"]
    assert all(result["tests"][name]["median_s"] > 0 for name in ("one", "shared", "many"))
    assert result["tests"]["many"]["num_steps"] > 6 and result["tests"]["many"]["num_preemptions"] == 0
    assert "longer than 8 s" in result["tests"]["slow"]["error"]
    assert result["tests"]["fatal"]["error"] == UNFINISHED
    assert (result["model"], result["tag"], result["engine"]) == ("mixture", "t", "lockstep")
    start = result["startup"]
    assert start["cache_state"] == "cold" and start["process_start_to_first_token_s"] > start["import_s"] > 0
    assert result["kernels"]["fused_moe"] and result["memory"] and result["memory_at_end"]
    printed = capfd.readouterr().out
    assert printed.count("STARTUP") == 3 and printed.count("RESULT") == 4 and "DONE mixture" in printed


def test_a_start_that_fails_ends_the_run(
    file: WorkloadFile, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [
        "ours",
        "--workloads",
        str(tmp_path / "workloads.py"),
        "--out",
        str(tmp_path / "o.json"),
        "--tests",
    ]
    assert main([*command, "", "--model", "tiny"]) == 1
    assert "the engine did not start" in capfd.readouterr().err
    assert main([*command, "meny", "--model", "tiny"]) == 1
    assert "did you mean 'many'" in capfd.readouterr().err


def test_no_test_begins_after_the_budget(file: WorkloadFile, tmp_path: Path) -> None:
    out = tmp_path / "ours.json"
    command = ["ours", "--workloads", str(tmp_path / "workloads.py"), "--model", "mixture", "--out", str(out)]
    command += ["--engine-args", '{"device": "cpu", "threads": 1, "max_total_tokens": 1024}', "--budget-s", "0"]
    assert main([*command, "--tests", "one,fatal"]) == 0
    result = json.loads(out.read_text())
    assert result["tests"] == {name: {"skipped": "out of time"} for name in ("one", "fatal")}
    assert result["startup"]["process_start_to_first_token_s"] > 0


def test_every_token_of_a_made_vocabulary_has_a_text(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_tokenizer(300)))
    read = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert read.get_vocab_size() == 300 and read.decode([299, 256]) == " w299 w256"
    text = "Grüße, 你\n"
    assert read.decode(read.encode(text).ids) == text and len(read.encode(text).ids) == len(text.encode())
    with pytest.raises(ConfigError, match="no room"):
        byte_tokenizer(255)


def test_figures_of_a_served_load() -> None:
    first = Exchange(0.0, [0.1, 0.11, 0.15], 0.2, 2, 5)
    second = Exchange(1.0, [1.3, 1.4], 1.5, 2, 3)
    found = serving_figures([first, second], 16.0)
    assert found["ttft_ms"]["median"] == pytest.approx(200) and found["ttft_ms"]["n"] == 2
    assert found["itl_ms"]["max"] == pytest.approx(100) and found["itl_ms"]["mean"] == pytest.approx(50)
    assert found["tpot_ms"]["mean"] == pytest.approx((50 / 4 + 100 / 2) / 2)
    assert found["span_s"] == pytest.approx(1.4) and found["output_tokens_per_s"] == pytest.approx(8 / 1.4)
    assert found["e2e_ms"]["max"] == pytest.approx(400)
    with pytest.raises(LockstepError, match="status 503"):
        serving_figures([first, Exchange(0.0, error="status 503: full")], 16.0)


def test_a_server_is_started_loaded_and_stopped(
    file: WorkloadFile, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "served.json"
    command = ["serve", "--workloads", str(tmp_path / "workloads.py"), "--model", "mixture", "--out", str(out)]
    command += ["--engine-args", '{"device": "cpu", "threads": 1, "max_total_tokens": 1024}', "--limit-s", "60"]
    assert main([*command, "--rates", "50,100"]) == 0
    result = json.loads(out.read_text())
    for rate, least_s in (("50.0", 2 / 50), ("100.0", 2 / 100)):
        served = result["tests"][f"serving_rate_{rate}"]
        assert served["requests"] == 3 and served["tokens_out"] == 6 and served["digest"] == "sum-online"
        assert served["span_s"] > least_s and served["ttft_ms"]["n"] == 3
    assert result["startup"]["process_start_to_first_token_s"] > result["startup"]["process_start_to_healthy_s"]
    client = tmp_path / "client.py"
    client.write_text(
        "import json, sys\n"
        "given = dict(zip(sys.argv[2::2], sys.argv[3::2]))\n"
        "assert sys.argv[1] == 'client' and given['--url'].startswith('http')\n"
        "tests = {'serving_rate_50.0': {'kind': 'serving', 'ttft_ms': {'median': 1.0}}}\n"
        "json.dump({'tests': tests}, open(given['--out'], 'w'))\n"
    )
    assert main([*command, "--rates", "50,inf", "--client", str(client)]) == 0
    tests = json.loads(out.read_text())["tests"]
    assert tests["serving_rate_50.0"]["ttft_ms"] == {"median": 1.0}
    assert tests["serving_rate_inf"] == {"error": "client.py ended with exit code 0"}
    assert main([*command, "--engine-args", '{"device": "nowhere"}']) == 1
    assert "before it was ready" in capfd.readouterr().err


def result_of(engine: str, model: str, start_s: float, state: str, **tests: Any) -> dict[str, Any]:
    startup = {"cache_state": state, "process_start_to_first_token_s": start_s}
    return {"engine": engine, "model": model, "startup": startup, "tests": tests}


def goal_rows(own: list[dict[str, Any]], peers: list[dict[str, Any]]) -> dict[str, list[str]]:
    lines = goals_table(own, peers).splitlines()[2:]
    assert len(lines) == len(GOALS)
    return {
        cells[0]: cells[1:] for line in lines if (cells := [cell.strip() for cell in line.split("|")[1:-1]])
    }


def test_goals_are_against_the_peer_of_the_sitting_or_what_was_seen() -> None:
    asked = {"digest": "d", "kind": "throughput"}
    served = {"kind": "serving", "ttft_ms": {"median": 60.0}, "itl_ms": {"p99": 30.0}}
    own = [
        result_of("lockstep", "qwen3-8b", 7.3, "warm", throughput={**asked, "output_tokens_per_s": 8800.0}),
        result_of("lockstep", "qwen3-8b", 30.5, "cold", decode_b1={"digest": "e", "ms_per_step": 5.68}),
        result_of("lockstep", "qwen3-8b", 9.0, "warm", **{"serving_rate_16.0": served}),
    ]
    own[2]["startup"]["process_start_to_healthy_s"] = 8.0
    seen = goal_rows(own, [])
    assert seen["8B: 256 requests"][1:] == [
        "7672 (seen earlier)",
        "8800",
        "1.15",
        "1.05x; 1.15x",
        "first reached",
    ]
    assert seen["8B: batch 1"][2:] == ["5.68", "0.83", "5.9; 5.4", "first reached"]
    assert seen["8B: process start to first token, caches warm"][2:] == [
        "7.30",
        "0.21",
        "12; 6",
        "first reached",
    ]
    assert seen["8B: process start to first token, caches cold"][-1] == "missed: 0.98 of the first"
    assert seen["8B: server at 16/s, TTFT p50"][1:] == [
        "45 (seen earlier)",
        "60",
        "1.33",
        "1x",
        "missed: 0.75 of the first",
    ]
    assert seen["8B: server at 16/s, ITL p99"][-1] == "reached"
    assert seen["0.6B: batch 1"][2:] == ["", "", "1; 0.6", "not measured"]
    peers = [
        result_of("vllm", "qwen3-8b", 34.0, "warm", throughput={**asked, "output_tokens_per_s": 7000.0}),
        result_of("vllm", "qwen3-8b", 33.0, "warm", throughput={**asked, "output_tokens_per_s": 7500.0}),
        result_of("vllm", "qwen3-8b", 99.0, "cold", throughput={"digest": "x", "output_tokens_per_s": 1e6}),
        result_of("vllm", "qwen3-8b", 99.0, "cold", **{"serving_rate_16.0": served}),
    ]
    beside = goal_rows(own, peers)
    assert beside["8B: 256 requests"][1:] == ["7500", "8800", "1.17", "1.05x; 1.15x", "both reached"], (
        "the best, same requests"
    )
    assert beside["8B: server at 16/s, TTFT p50"][-1] == "reached"


def test_parts_of_a_run_are_one_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served = {"kind": "serving", "ttft_ms": {"median": 60.0, "p99": 90.0}, "itl_ms": {"p99": 30.0}}
    parts = [
        result_of("lockstep", "m", 7.0, "warm", one={"kind": "decode", "digest": "d", "ms_per_step": 4.0}),
        result_of("lockstep", "m", 9.0, "warm", **{"serving_rate_16.0": served}),
        result_of("vllm", "m", 30.0, "warm", **{"serving_rate_16.0": served}),
    ]
    files = []
    for number, part in enumerate(parts):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(part))
    assert main(["report", "--ours", *map(str, files[:2]), "--peer", str(files[2])]) == 0
    printed = capsys.readouterr().out
    assert printed.count("## m") == 1
    assert "| serving_rate_16.0 | ms to the first token, p99 | 90 | 90 | 1.00 |" in printed
    assert "| one | ms a step |  | 4 |  |" in printed
