"""Workloads that other engines run too: what is asked, what is measured, the tables."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from lockstep import LLM
from lockstep.bench.workload import Job
from lockstep.core.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from gpu_peers import main
from peers.gpu_engine import InProcess, OutOfTime, limited, process_started_s
from peers.gpu_measures import Ceilings, Measurer
from peers.gpu_workloads import WorkloadFile

pytestmark = pytest.mark.suite("cpu")

FILE = """
MODELS = {"tiny": {"vocab_size": 258}, "experts": {"num_experts": 4}}
WORKLOADS = {
    "many": {"kind": "throughput"},
    "one": {"kind": "decode"},
    "long": {"kind": "prefill"},
    "shared": {"kind": "prefix", "temperature": 0.5},
    "online": {"kind": "serving"},
}
PROMPTS = {
    "many": [[1, 2, 3], [4, 5]], "one": [[7] * 8], "long": [[9] * 40], "online": [[1]],
    "shared": [[5] * 12 + [1, 2], [5] * 12 + [2, 1]],
}
ANSWERS = {"many": 6, "one": 5, "long": 1, "shared": 3, "online": 2}

def requests(name, warmup=False):
    shift = 100 if warmup else 0
    return [dict(prompt=[t + shift for t in p], max_tokens=ANSWERS[name]) for p in PROMPTS[name]]

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
    # A warm-up, two runs, and two that follow a request for the shared prefix alone.
    assert engine.calls == [(6, 0.5), (6, 0.5), (6, 0.5), (1, 0.0), (6, 0.5), (1, 0.0), (6, 0.5)]
    assert figures["runs_s"][0] == figures["runs_s"][1], "the second run found the first one's prefixes"


def test_a_floor_needs_weights_that_each_step_reads(file: WorkloadFile) -> None:
    measurer = Measurer(Scripted(), file, "experts", Ceilings(1.0, copy_bytes_per_s=1.0))
    two = [Job((1,), 5), Job((2,), 5)]
    assert measurer._floor(two[:1], 1.0) and not measurer._floor(two, 1.0)


def test_what_the_file_lacks_is_said(file: WorkloadFile, tmp_path: Path) -> None:
    assert file.names() == ["many", "one", "long", "shared"]
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
        for name in file.names():
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


def test_the_report_sets_results_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def result(engine: str, start_s: float, **tests: dict[str, object]) -> Path:
        path = tmp_path / f"{engine}.json"
        startup = {"cache_state": "warm", "process_start_to_first_token_s": start_s}
        path.write_text(json.dumps({"engine": engine, "model": "m", "startup": startup, "tests": tests}))
        return path

    own = result(
        "lockstep",
        5.0,
        decode={"kind": "decode", "digest": "d", "ms_per_step": 4.0},
        many={"kind": "throughput", "digest": "t", "output_tokens_per_s": 300.0},
        other={"kind": "throughput", "digest": "mine", "output_tokens_per_s": 1.0},
        broken={"error": "OutOfMemory: no"},
        alone={"kind": "prefill", "digest": "p", "input_tokens_per_s": 9.0, "mfu_datasheet": 0.5},
    )
    peer = result(
        "vllm",
        30.0,
        decode={"kind": "decode", "digest": "d", "ms_per_step": 6.0},
        many={"kind": "throughput", "digest": "t", "output_tokens_per_s": 200.0},
        other={"kind": "throughput", "digest": "theirs", "output_tokens_per_s": 1.0},
        broken={"kind": "throughput", "digest": "b", "output_tokens_per_s": 1.0},
        alone={"error": "it failed"},
    )
    assert main(["report", "--ours", str(own), "--peer", str(peer), "--out", str(tmp_path / "t.md")]) == 0
    rows = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines() if "|" in line}
    assert "6.00" in rows["process start (caches warm; warm)"]
    assert rows["decode"].endswith("| 1.50 |") and rows["many"].endswith("| 1.50 |")
    assert "digests differ" in rows["other"] and "OutOfMemory" in rows["broken"]
    assert "50%" in rows["alone"] and rows["alone"].endswith("|  |")
    assert (tmp_path / "t.md").read_text().startswith("## m")
    assert main(["report", "--ours", str(tmp_path / "absent.json")]) == 1
