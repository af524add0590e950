"""The operators' run on a GPU machine: what it shares out over processes is everything, once."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lockstep.bench.fingerprint import fingerprint
from lockstep.ops.check import check_kernel
from lockstep.ops.contract import Kernel
from lockstep.ops.registry import contracts
from lockstep.ops.suite import OperatorReport, select
from lockstep.platforms.cpu import CpuPlatform

pytestmark = pytest.mark.suite("cpu")

CPU = CpuPlatform()
SCRIPT = Path(__file__).parents[2] / ".ci" / "cuda_operators.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_operators", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_parts_of_a_kernel_are_the_whole(script: ModuleType) -> None:
    (selected,) = select(CPU.capabilities(), op="layer_norm")
    tasks = [task for task in script.tasks_of(selected) if task[0] == "check" and task[2] == "torch"]
    assert len(tasks) > 1
    joined = script.joined([script.run_task(("cpu", task))[1] for task in tasks])
    (kernel,) = (kernel for kernel in selected.kernels if kernel.provider == "torch")
    whole = check_kernel(selected.contract, kernel, seed=script.SEED)
    assert replace(joined, refused=whole.refused, worst_case=whole.worst_case) == whole
    assert script.run_task(("cpu", ("mutants", "layer_norm", "", 0, 1)))[1] == []


def test_an_error_is_no_end_of_the_run(script: ModuleType) -> None:
    task = ("mutants", "no such operator", "", 0, 1)
    assert script.run_task(("cpu", task)) == (task, "KeyError: 'no such operator'")


def test_everything_is_warmed_that_is_timed(script: ModuleType) -> None:
    tasks = script.warming(script.TIMED)
    assert {task[1] for task in tasks} == set(script.TIMED)
    for op, sizes in script.SIZES.items():
        workload = contracts()[op].workload
        assert workload is not None and set(sizes) <= set(workload.sizes)
        assert "torch_compile" not in script.timed_providers(op)


def test_the_page_tells_what_is_wrong(script: ModuleType, tmp_path: Path) -> None:
    norm = contracts()["rms_norm"]
    doubled = Kernel(op="rms_norm", provider="doubled", function=lambda *given: 2 * norm.reference(*given))
    torch.set_num_threads(1)
    report = OperatorReport("rms_norm", (check_kernel(norm, doubled, seed=0),), (("aiter", "not here"),), 4, ())
    result = {
        "device": "a test",
        "seed": 0,
        "passed": False,
        "left_out": [["check", "rope", "triton", 0, 2]],
        "machine": fingerprint(),
        "operators": [report.as_json()],
    }
    (tmp_path / "check.json").write_text(json.dumps(result))
    script.draw_pages(tmp_path)
    page = (tmp_path / "check.md").read_text()
    assert f"| rms_norm | 4 of 4 | doubled | {len(list(norm.cases()))} | 0 |" in page
    assert "- rms_norm.aiter did not run: not here" in page
    assert page.count("- rms_norm.doubled: torch.float32") == script.FAILURES_SHOWN
    assert "- left out: check rope triton 0 2" in page and "failed on a test with seed 0" in page
    assert "[Each kernel against its contract](check.md)" in (tmp_path / "README.md").read_text()
