"""The scripts of the workflows: matrices from plans, the page of all reports, and the instruction set of objects."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from affected_project import SmallProject

from lockstep.ci.plan import plan_suite
from lockstep.ci.project import open_project
from lockstep.ci.registry import load_registry
from lockstep.cli.main import main
from lockstep.core.errors import ConfigError

pytestmark = pytest.mark.suite("cpu", seconds=8)

PROJECT = Path(__file__).parents[2]
SCRIPTS = PROJECT / "scripts" / "ci"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), SCRIPTS / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


matrix, summary, sets = script("matrix.py"), script("summary.py"), script("check_instruction_sets.py")


def plan_of(suite: str, num_parts: int, stage: str = "per-commit") -> dict[str, Any]:
    parts = [{"partition_id": number, "seconds": 1.0, "files": []} for number in range(num_parts)]
    return {"suite": suite, "stage": stage, "total_partitions": num_parts, "seconds": 1.0, "parts": parts}


def test_every_part_of_every_plan_gets_exactly_one_job() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    project = open_project(PROJECT)
    everywhere = {suite.platform for suite in project.suites.values()}
    for _ in range(50):
        plans = [plan_of(name, draw.randrange(0, 9)) for name in project.suites]
        found, left_out = matrix.matrices(project, plans, None, everywhere)
        jobs = [(each["suite"], each["id"], each["total"]) for parts in found.values() for each in parts]
        wanted = [
            (plan["suite"], number, plan["total_partitions"])
            for plan in plans
            for number in range(plan["total_partitions"])
        ]
        assert sorted(jobs) == sorted(wanted)
        assert {text.partition(":")[0] for text in left_out} == {p["suite"] for p in plans if not p["parts"]}


def test_the_matrix_of_this_project_comes_from_its_plan() -> None:
    project = open_project(PROJECT)
    registry = load_registry(project)
    plans = [plan_suite(registry, name, "all", seconds_per_part=100.0).as_json() for name in project.suites]
    found, _ = matrix.matrices(project, plans, None, ["cpu", "sim"])
    assert (
        len(found["cpu"])
        == plan_suite(registry, "cpu", "all", seconds_per_part=100.0).as_json()["total_partitions"]
    )
    assert len(found["cpu"]) > 1


def test_what_is_left_out_is_said_with_its_reason() -> None:
    project = open_project(PROJECT)
    plans = [plan_of(name, 0 if name == "sim" else 2, "nightly") for name in project.suites]
    found, left_out = matrix.matrices(project, plans, {"cpu", "sim", "cuda-1"}, ["cpu", "sim"])
    assert [each["suite"] for parts in found.values() for each in parts] == ["cpu", "cpu"]
    assert "sim: no test in stage nightly" in left_out
    assert "cuda-1: no machine with platform cuda" in left_out
    assert "rocm-1: not touched by the change" in left_out
    assert set(found) == {suite.platform for suite in project.suites.values()}


def test_wrong_plans_and_runners_are_refused() -> None:
    project = open_project(PROJECT)
    plans = [plan_of(name, 1) for name in project.suites]
    with pytest.raises(ConfigError, match="no suite runs on platform 'cude'; did you mean 'cuda'"):
        matrix.matrices(project, plans, None, ["cude"])
    with pytest.raises(ConfigError, match=r"suite .* has no plan"):
        matrix.matrices(project, plans[1:], None, ["cpu"])


def test_a_suite_asks_for_a_machine_that_can_run_it() -> None:
    suites = open_project(PROJECT).suites
    assert matrix.runner_of(suites["cpu"]) == matrix.runner_of(suites["sim"]) == [matrix.HOSTED]
    assert matrix.runner_of(suites["cuda-2"]) == ["self-hosted", "cuda", "devices-2"]


def in_project(
    project: SmallProject, script: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A script of the workflows, run in a small project with the interpreter and the sources of this one."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", f"scripts/ci/{script}", *arguments],
        capture_output=True,
        text=True,
        cwd=project.root,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(PROJECT / "src"), **environment},
        timeout=120,
    )


@pytest.fixture
def project(tmp_path: Path) -> SmallProject:
    """The small project, with the scripts of the workflows in it from the start."""
    made = SmallProject(tmp_path)
    shutil.copytree(SCRIPTS, made.root / "scripts" / "ci", ignore=shutil.ignore_patterns("__pycache__"))
    made.write(".gitignore", "*.json\n__pycache__/\n")
    made.commit()
    made.git("tag", "-f", "base")
    return made


def test_from_a_change_to_the_jobs(project: SmallProject) -> None:
    project.append("src/lockstep/server/app.py", "x = 1\n")
    touched = in_project(project, "touched.sh", "base", "affected.json")
    assert touched.returncode == 0, touched.stderr
    assert touched.stdout.startswith("# Review") and "`app.py`" in touched.stdout
    planned = in_project(project, "plan.sh", "affected.json", STAGE="per-commit", RUNNERS="cpu cuda")
    assert planned.returncode == 0, planned.stderr
    lines = dict(line.split("=", 1) for line in planned.stdout.splitlines())
    assert [each["suite"] for each in json.loads(lines["cpu"])] == ["cpu"]
    assert json.loads(lines["cuda"]) == []
    assert json.loads(lines["left_out"]) == ["cuda-1: not touched by the change"]


def test_without_a_base_and_when_asked_everything_runs(project: SmallProject) -> None:
    first_push = in_project(project, "touched.sh", "0" * 40, "affected.json")
    assert first_push.returncode == 0 and "every suite runs" in first_push.stdout
    asked = in_project(project, "touched.sh", "base", "affected.json", RUN_ALL="true")
    assert asked.returncode == 0 and "Nothing differs" in asked.stdout
    assert not (project.root / "affected.json").exists()
    planned = in_project(project, "plan.sh", "affected.json", STAGE="all", RUNNERS="cpu cuda")
    lines = dict(line.split("=", 1) for line in planned.stdout.splitlines())
    assert json.loads(lines["cpu"]) and json.loads(lines["cuda"])


def test_a_suite_without_tests_stops_the_plan_but_at_night(project: SmallProject) -> None:
    night = in_project(project, "plan.sh", "affected.json", STAGE="nightly", RUNNERS="cpu cuda")
    assert night.returncode == 0 and "cuda-1: no test in stage nightly" in night.stdout
    project.append("pyproject.toml", '[tool.lockstep.testing.suites.idle]\nplatform = "cpu"\n')
    day = in_project(project, "plan.sh", "affected.json", STAGE="per-commit", RUNNERS="cpu cuda")
    assert day.returncode == matrix.NOTHING_SELECTED and "no test in suite idle" in day.stderr


def test_a_suite_that_belongs_nowhere_stops_the_plan(project: SmallProject) -> None:
    project.write("tests/server/test_homeless.py", "def test_a(): ...\n")
    assert in_project(project, "touched.sh", "base", "affected.json").returncode != 0
    planned = in_project(project, "plan.sh", "affected.json", STAGE="per-commit", RUNNERS="cpu")
    assert planned.returncode != 0 and planned.stdout == ""


def test_the_command_prints_markdown_and_json(
    project: SmallProject, capsys: pytest.CaptureFixture[str]
) -> None:
    project.append("src/lockstep/core/clock.py", "x = 1\n")
    there = ["suites", "affected", "--root", str(project.root), "--base"]
    assert main([*there, "base"]) == 0
    assert "| core | 1 | 1 | 0 | `clock.py` |" in capsys.readouterr().out
    assert main([*there, "base", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["suites"][0]["name"] == "cpu"
    assert main([*there, "nowhere"]) == 2
    assert "no such commit: nowhere" in capsys.readouterr().err


PART = {"suite": "cpu", "id": 0, "number": 1, "total": 1}


def state(cpu: str = "success", parts: list[dict[str, Any]] | None = None, **others: str) -> dict[str, Any]:
    outputs = {
        "cpu": json.dumps([PART] if parts is None else parts),
        "cuda": "[]",
        "left_out": '["cuda-1: why"]',
    }
    jobs = {"plan": "success", "cpu": cpu, "cuda": "skipped", "checks": "success", **others}
    return {
        name: {"result": result, "outputs": outputs if name == "plan" else {}} for name, result in jobs.items()
    }


def reported(folder: Path) -> Path:
    (folder / "report-cpu-0").mkdir()
    (folder / "report-cpu-0" / "summary.md").write_text("12 passed\n", "utf-8")
    return folder


def test_the_page_joins_the_reports(tmp_path: Path) -> None:
    page = "\n".join(summary.page(state(), reported(tmp_path)))
    assert page.startswith("# Passed") and "- left out: cuda-1: why" in page
    assert "## cpu, part 1 of 1" in page and "12 passed" in page


@pytest.mark.parametrize(
    ("needs", "said"),
    [
        (state("failure"), "job cpu: failure"),
        (state("cancelled"), "job cpu: cancelled"),
        (state("skipped"), "job cpu did not run"),
        (state(checks="failure"), "job checks: failure"),
        (state(checks="skipped"), "job checks did not run"),
        (state(parts=[PART, {**PART, "id": 1, "number": 2, "total": 2}]), "suite cpu, part 2 of 2: no report"),
        ({name: each for name, each in state().items() if name != "cuda"}, "platform cuda has no job"),
        ({**state(), "plan": {"result": "failure", "outputs": {}}}, "job plan: failure"),
    ],
)
def test_the_page_is_not_green_when_something_is_missing(
    tmp_path: Path, needs: dict[str, Any], said: str
) -> None:
    reports = reported(tmp_path)
    assert said in list(summary.faults(needs, reports))
    assert "\n".join(summary.page(needs, reports)).startswith("# Failed")
    (tmp_path / "needs.json").write_text(json.dumps(needs), "utf-8")
    command = [
        sys.executable,
        str(SCRIPTS / "summary.py"),
        str(reports),
        "--needs",
        str(tmp_path / "needs.json"),
    ]
    assert subprocess.run(command, capture_output=True).returncode == 1


def test_the_reports_of_a_single_part_lie_without_a_folder(tmp_path: Path) -> None:
    """So the action that downloads them leaves them where only one artifact fits its pattern."""
    (tmp_path / "summary.md").write_text("7 passed\n", "utf-8")
    assert list(summary.faults(state(), tmp_path)) == []
    assert "7 passed" in "\n".join(summary.page(state(), tmp_path))
    two = state(parts=[PART, {**PART, "id": 1, "number": 2, "total": 2}])
    assert len(list(summary.faults(two, tmp_path))) == 2, "whose it is would be a guess"


def test_what_parts_measured_is_joined_and_the_rest_is_named(project: SmallProject) -> None:
    for number, times in enumerate(({"tests/server/test_app.py": 3.5}, {"tests/gone.py": 1.0})):
        measured = {"cpu": {target: {"per-commit": seconds} for target, seconds in times.items()}}
        folder = project.root / "reports" / f"report-cpu-{number}"
        folder.mkdir(parents=True)
        (folder / "durations.json").write_text(json.dumps(measured), "utf-8")
    (project.root / ".ci" / "durations.json").write_text(
        '{"cpu": {"tests/cli/test_main.py": {"per-commit": 2}}}'
    )
    command = [sys.executable, "scripts/ci/join_durations.py"]
    done = subprocess.run(
        [*command, "reports", "joined.json"], cwd=project.root, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((project.root / "joined.json").read_text()) == {
        "cpu": {"tests/cli/test_main.py": {"per-commit": 2.0}, "tests/server/test_app.py": {"per-commit": 3.5}}
    }
    assert "2 times measured by 2 parts" in done.stdout
    assert "- cpu: 3 never measured: tests/engine/test_llm.py, tests/ops/test_parity.py" in done.stdout
    nothing = subprocess.run(
        [*command, "absent", "joined.json"], cwd=project.root, capture_output=True, timeout=60
    )
    assert nothing.returncode == 1


def test_a_change_that_touches_no_suite_is_no_success_story(tmp_path: Path) -> None:
    needs = state("skipped", parts=[])
    assert list(summary.faults(needs, tmp_path)) == []
    assert "\n".join(summary.page(needs, tmp_path)).startswith("# No suite was run")


LISTING = """
a.o:     file format elf64-x86-64

Disassembly of section .text:

0000000000000000 <add(float*, float*)>:
   0:\t{instruction}
   4:\tret
"""


@pytest.mark.parametrize(
    ("instruction", "is_found"),
    [
        ("vaddps (%rsi,%rax,1),%zmm1,%zmm0", True),
        ("vmovups %ymm0,(%rdi)", True),
        ("vmulss %xmm1,%xmm0,%xmm0", True),
        ("vzeroupper", True),
        ("kmovq  %rax,%k1", True),
        ("addps  (%rsi),%xmm0", False),
        ("pshufb %xmm1,%xmm0", False),
        ("call   20 <vmov(int)>", False),
        ("mov    $0x5,%eax", False),
    ],
)
def test_instructions_beyond_the_baseline(tmp_path: Path, instruction: str, is_found: bool) -> None:
    done = checked("a.o", "--objdump", printing(tmp_path, instruction))
    assert done.returncode == (sets.FOUND if is_found else sets.CLEAN), done.stdout + done.stderr
    if is_found:
        assert "add(float*, float*): " + " ".join(instruction.split()) in done.stdout


# Each with the sets whose objects may hold it.
HELD = {
    "vpaddd %ymm1,%ymm0,%ymm0": {"avx2", "avx_vnni", "avx512", "avx512_bf16", "amx"},
    "{vex} vpdpbusd %ymm1,%ymm0,%ymm2": {"avx_vnni"},
    "vpaddd %ymm1,%ymm16,%ymm0": {"avx512", "avx512_bf16", "amx"},
    "vpdpbusd %zmm1,%zmm0,%zmm2": {"avx512", "avx512_bf16", "amx"},
    "vpdpbusd %ymm1,%ymm0,%ymm2": {"avx512", "avx512_bf16", "amx"},
    "vdpbf16ps %zmm1,%zmm0,%zmm2": {"avx512_bf16", "amx"},
    "vcvtneps2bf16 %zmm1,%ymm0": {"avx512_bf16", "amx"},
    "tdpbssd %tmm2,%tmm1,%tmm0": {"amx"},
    "ldtilecfg (%rax)": {"amx"},
    "tilerelease": {"amx"},
}


@pytest.mark.parametrize("instruction", HELD)
def test_instructions_beyond_a_set(tmp_path: Path, instruction: str) -> None:
    for name in ("avx2", "avx_vnni", "avx512", "avx512_bf16", "amx", "neon"):
        done = checked(f"dir/product_{name}.cpp.o", "--objdump", printing(tmp_path, instruction))
        assert done.returncode == (sets.CLEAN if name in HELD[instruction] else sets.FOUND), (name, done.stdout)


def printing(folder: Path, instruction: str) -> str:
    """A stand-in for objdump that prints a listing, so that tests need neither a compiler nor binutils."""
    listing, stand_in = folder / "listing", folder / "objdump"
    listing.write_text(LISTING.format(instruction=instruction), "utf-8")
    stand_in.write_text(f'#!/bin/sh\ncat "{listing}"\n', "utf-8")
    stand_in.chmod(0o755)
    return str(stand_in)


def checked(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "check_instruction_sets.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_check_that_cannot_be_made_is_no_success(tmp_path: Path) -> None:
    assert checked().returncode == sets.UNUSABLE
    missing = checked("a.o", "--objdump", "no-such-program")
    assert missing.returncode == sets.UNUSABLE and "install binutils" in missing.stderr
    for text in ("a.o: file format elf64-littleaarch64\n   0:\tret\n", "a.o: file format elf64-x86-64\n", ""):
        stand_in = tmp_path / "objdump"
        stand_in.write_text(f"#!/bin/sh\nprintf '{text}'\n", "utf-8")
        stand_in.chmod(0o755)
        assert checked("a.o", "--objdump", str(stand_in)).returncode == sets.UNUSABLE


HAS_TOOLS = bool(shutil.which("objdump") and shutil.which("gcc")) and os.uname().machine == "x86_64"


@pytest.mark.skipif(not HAS_TOOLS, reason="wants gcc and objdump on x86-64; the stand-in above needs neither")
@pytest.mark.parametrize(("flag", "outcome"), [("-msse4.2", 0), ("-mavx", 1), ("-mavx2", 1), ("-mavx512f", 1)])
def test_real_objects(tmp_path: Path, flag: str, outcome: int) -> None:
    source = "void add(float *a, float *b) { for (int i = 0; i < 999; i++) a[i] += b[i]; }"
    made = tmp_path / "a.o"
    subprocess.run(
        ["gcc", "-O3", flag, "-c", "-x", "c", "-", "-o", str(made)], input=source, text=True, check=True
    )
    done = checked(str(made))
    assert done.returncode == outcome, done.stdout + done.stderr
