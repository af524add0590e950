"""The workflows: sound for GitHub, every suite reachable from a job, and no number of jobs kept by hand."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lockstep.ci.project import Project, Suite, open_project

pytestmark = pytest.mark.suite("cpu", seconds=3)

PROJECT = Path(__file__).parents[2]
WORKFLOWS = PROJECT / ".github" / "workflows"
SCRIPTS = PROJECT / "scripts" / "ci"
INPUTS = {"target_stage", "run_all_tests"}
ON: Any = True
"""YAML 1.1 reads the key `on` as a truth value."""


def workflow(name: str) -> dict[Any, Any]:
    found: dict[Any, Any] = yaml.safe_load((WORKFLOWS / name).read_text("utf-8"))
    return found


@pytest.fixture
def ci() -> dict[Any, Any]:
    return copy.deepcopy(workflow("ci.yml"))


def actionlint(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    program = shutil.which("actionlint", path=f"{Path(sys.executable).parent}") or shutil.which("actionlint")
    assert program is not None, 'actionlint is missing; pip install -e ".[test]" brings it on Linux'
    command = [program, "-no-color", "-shellcheck=", "-pyflakes=", *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, cwd=PROJECT, timeout=60)


def test_actionlint_finds_nothing() -> None:
    files = sorted(map(str, WORKFLOWS.glob("*.yml")))
    assert len(files) >= 4
    done = actionlint(*files)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("needs: plan", "needs: plans"),
        ("needs.plan.outputs.cuda }}", "needs.plan.outputs.cude }}"),
        ("runs-on: ubuntu-24.04", "run-on: ubuntu-24.04"),
        ("install: rocm", "instal: rocm"),
    ],
)
def test_actionlint_would_find_a_fault(old: str, new: str) -> None:
    text = (WORKFLOWS / "ci.yml").read_text("utf-8")
    assert old in text
    done = actionlint("-stdin-filename", ".github/workflows/ci.yml", "-", text=text.replace(old, new))
    assert done.returncode == 1 and "ci.yml" in done.stdout, done.stdout + done.stderr


def unreachable(project: Project, found: dict[Any, Any], scripts: set[str]) -> Iterator[str]:
    """What keeps a suite of the project from being run and watched by the workflow."""
    jobs, outputs = found["jobs"], found["jobs"]["plan"]["outputs"]
    for suite in project.suites.values():
        name = suite.platform
        parts = f"${{{{ needs.plan.outputs.{name} }}}}"
        if outputs.get(name) != f"${{{{ steps.matrix.outputs.{name} }}}}":
            yield f"{suite.name}: the plan has no output {name}"
        job = jobs.get(name)
        if job is None:
            yield f"{suite.name}: no job {name}"
            continue
        if job.get("uses") != "./.github/workflows/platform.yml" or job["with"].get("parts") != parts:
            yield f"{suite.name}: job {name} does not run the parts of {name}"
        if job.get("if") != f"needs.plan.outputs.{name} != '[]'" or job.get("needs") != "plan":
            yield f"{suite.name}: job {name} may be skipped though it has parts"
        if f"install_{job['with'].get('install')}.sh" not in scripts:
            yield f"{suite.name}: nothing installs {job['with'].get('install')}"
        if name not in jobs["summary"]["needs"]:
            yield f"{suite.name}: the summary does not wait for {name}"


SCRIPT_NAMES = {path.name for path in SCRIPTS.glob("install_*.sh")}


def test_every_suite_is_reachable_from_a_job(ci: dict[Any, Any]) -> None:
    project = open_project(PROJECT)
    assert len(project.suites) >= 7
    assert list(unreachable(project, ci, SCRIPT_NAMES)) == []
    assert set(ci["jobs"]["summary"]["needs"]) == set(ci["jobs"]) - {"summary"}


def test_a_suite_that_no_job_reaches_is_found(ci: dict[Any, Any]) -> None:
    project = open_project(PROJECT)
    more = {**project.suites, "xpu-1": Suite(name="xpu-1", platform="xpu")}
    extended = Project(project.root, more, project.settings)
    assert "xpu-1: no job xpu" in list(unreachable(extended, ci, SCRIPT_NAMES))

    def fault(**changed: Any) -> list[str]:
        other = copy.deepcopy(ci)
        other["jobs"]["cuda"].update(changed)
        return list(unreachable(project, other, SCRIPT_NAMES))

    steps = ci["jobs"]["cuda"]["with"]
    assert fault() == []
    assert fault(uses="./.github/workflows/other.yml")
    assert fault(**{"if": "false"})
    assert fault(**{"with": {**steps, "parts": "[1, 2]"}})
    assert fault(**{"with": {**steps, "install": "none"}})
    del ci["jobs"]["plan"]["outputs"]["sim"]
    ci["jobs"]["summary"]["needs"].remove("musa")
    found = list(unreachable(project, ci, SCRIPT_NAMES))
    assert {text.partition(":")[0] for text in found} == {"sim", "musa-1", "musa-2"}


FREE_MATRICES = {"wheels.yml"}
"""Architectures that a compiler is there for; no suite decides them."""


def counted_by_hand(text: str) -> list[str]:
    """Lines of a script that fix a number of parts instead of asking the plan."""
    return [
        line.strip()
        for line in text.splitlines()
        if re.search(r"(partitions?|partition-id|parts?|total)\b[\"': =]+\[?\s*\d", line)
    ]


def fixed_matrices(name: str, found: dict[Any, Any]) -> Iterator[str]:
    """Jobs whose matrix is written down instead of computed by the plan."""
    for job, content in found["jobs"].items():
        strategy = content.get("strategy", {})
        matrix = strategy.get("matrix")
        values = [matrix] if isinstance(matrix, str) else list((matrix or {}).values())
        is_computed = all(
            isinstance(value, str) and re.fullmatch(r"\$\{\{ fromJSON\(.+\) \}\}", value) for value in values
        )
        if name not in FREE_MATRICES and matrix is not None and not is_computed:
            yield f"{name}: job {job}"


def test_no_number_of_parts_is_kept_by_hand() -> None:
    for path in [*WORKFLOWS.glob("*.yml"), *SCRIPTS.glob("*.sh")]:
        assert counted_by_hand(path.read_text("utf-8")) == [], path.name
    for path in WORKFLOWS.glob("*.yml"):
        assert list(fixed_matrices(path.name, workflow(path.name))) == []


@pytest.mark.parametrize(
    "strategy",
    [
        {"matrix": {"shard": [0, 1, 2]}},
        {"matrix": {"include": [{"suite": "cpu", "id": 0}]}},
        {"matrix": {"include": "${{ fromJSON(inputs.parts) }}", "more": ["a"]}},
        {"matrix": "[0, 1]"},
    ],
)
def test_a_matrix_that_is_written_down_is_found(strategy: dict[str, Any]) -> None:
    planted = {"jobs": {"more": {"strategy": strategy}, "plain": {}}}
    assert list(fixed_matrices("ci.yml", planted)) == ["ci.yml: job more"]


@pytest.mark.parametrize(
    "line",
    [
        "run: lockstep suites run --total-partitions 4",
        "part: [0, 1]",
        "PARTS: 3",
        "total: '2'",
        "lockstep suites plan --total-partitions=8",
    ],
)
def test_a_number_kept_by_hand_is_found(line: str) -> None:
    assert counted_by_hand(line.lower()) == [line.lower()]


PART_STEPS: dict[str, dict[str, Any]] = {
    "Install": {
        "name": "Install",
        "env": {"INSTALL": "${{ inputs.install }}"},
        "run": 'bash "scripts/ci/install_$INSTALL.sh"',
    },
    "Run": {
        "name": "Run",
        "env": {
            "SUITE": "${{ matrix.suite }}",
            "STAGE": "${{ inputs.stage }}",
            "PART": "${{ matrix.id }}",
            "PARTS": "${{ matrix.total }}",
            "LOCKSTEP_REQUIRE_BROWSER": 1,
        },
        "run": '.venv/bin/lockstep suites run --suite "$SUITE" --stage "$STAGE" --continue-on-error '
        '--partition-id "$PART" --total-partitions "$PARTS" --report-dir build/suites\n',
    },
    "Keep the report": {
        "name": "Keep the report",
        "if": "always()",
        "uses": "actions/upload-artifact@v6",
        "with": {
            "name": "report-${{ matrix.suite }}-${{ matrix.id }}",
            "path": "build/suites",
            "if-no-files-found": "error",
        },
    },
}
"""What makes a part of a plan count; another key, such as continue-on-error, would let a failure pass."""


def idle_parts(platform: dict[Any, Any]) -> Iterator[str]:
    """What keeps a job of a part from running the part and telling what came of it."""
    job = platform["jobs"]["part"]
    if set(job) != {"name", "runs-on", "timeout-minutes", "environment", "strategy", "steps"}:
        yield f"the job has {sorted(job)}"
    if job["strategy"] != {"fail-fast": False, "matrix": {"include": "${{ fromJSON(inputs.parts) }}"}}:
        yield f"the strategy is {job['strategy']}"
    if job["runs-on"] != "${{ matrix.runner }}":
        yield f"it runs on {job['runs-on']}"
    steps = {step.get("name", step.get("uses", "")): step for step in job["steps"]}
    if list(steps) != ["actions/checkout@v6", *PART_STEPS]:
        yield f"the steps are {list(steps)}"
    for name, wanted in PART_STEPS.items():
        if steps.get(name) != wanted:
            yield f"step {name} is {steps.get(name)}"


def test_each_part_runs_its_share_and_keeps_the_report() -> None:
    assert list(idle_parts(workflow("platform.yml"))) == []


@pytest.mark.parametrize(
    ("step", "change", "said"),
    [
        (2, {"run": "echo all well"}, "step Run is"),
        (2, {"continue-on-error": True}, "step Run is"),
        (2, {"if": "false"}, "step Run is"),
        (2, {"env": {"SUITE": "cpu"}}, "step Run is"),
        (1, {"continue-on-error": True}, "step Install is"),
        (3, {"if": "success()"}, "step Keep the report is"),
        (None, {"continue-on-error": True}, "the job has"),
        (None, {"if": "false"}, "the job has"),
        (None, {"strategy": {"fail-fast": False, "matrix": {"id": [0]}}}, "the strategy is"),
    ],
)
def test_a_part_that_does_nothing_is_found(step: int | None, change: dict[str, Any], said: str) -> None:
    platform = copy.deepcopy(workflow("platform.yml"))
    job = platform["jobs"]["part"]
    (job if step is None else job["steps"][step]).update(change)
    (fault,) = idle_parts(platform)
    assert fault.startswith(said)


def lenient(found: dict[Any, Any]) -> Iterator[str]:
    """What would keep the one required check from failing, or suites from being planned."""
    summary, plan = found["jobs"]["summary"], found["jobs"]["plan"]
    if summary.get("if") != "always()":
        yield "the summary may be skipped, and a skipped check counts as passed"
    if "python3 scripts/ci/summary.py reports --needs needs.json" not in summary["steps"][-1].get("run", ""):
        yield "the summary asks nobody"
    if plan["env"]["RUNNERS"] != "${{ vars.LOCKSTEP_RUNNERS || 'cpu sim' }}":
        yield "the platforms with machines are not cpu and sim by default"
    runs = [step.get("run", "") for step in plan["steps"]]
    for script in ('touched.sh "$BASE" affected.json', "plan.sh affected.json"):
        if not any(f"bash scripts/ci/{script}" in run for run in runs):
            yield f"the plan does not run {script}"
    for name, job in found["jobs"].items():
        if any("continue-on-error" in each for each in (job, *job.get("steps", ()))):
            yield f"job {name} may fail unseen"
    group = "ci-${{ github.workflow }}-${{ github.event_name == 'push' && github.sha || github.ref }}"
    if found["concurrency"]["group"] != group:
        yield "of several pushes some would go untested"


def test_the_required_check_can_fail(ci: dict[Any, Any]) -> None:
    assert list(lenient(ci)) == []


@pytest.mark.parametrize(
    ("where", "change"),
    [
        (("jobs", "summary"), {"if": "success()"}),
        (("jobs", "summary"), {"continue-on-error": True}),
        (("jobs", "summary", "steps", 2), {"run": "echo passed"}),
        (("jobs", "summary", "steps", 2), {"continue-on-error": True}),
        (("jobs", "plan", "env"), {"RUNNERS": "${{ vars.LOCKSTEP_RUNNERS || 'sim' }}"}),
        (("jobs", "plan", "steps", 4), {"run": "echo cpu=[]"}),
        (("jobs", "checks", "steps", 3), {"continue-on-error": True}),
        (("concurrency",), {"group": "ci-${{ github.ref }}"}),
    ],
)
def test_a_check_that_cannot_fail_is_found(
    ci: dict[Any, Any], where: tuple[Any, ...], change: dict[str, Any]
) -> None:
    place = ci
    for key in where:
        place = place[key]
    place.update(change)
    assert len(list(lenient(ci))) == 1


def test_the_oldest_python_that_is_promised_runs_the_cpu_suite() -> None:
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (PROJECT / "pyproject.toml").read_text("utf-8"))
    assert oldest is not None
    steps = workflow("nightly.yml")["jobs"]["oldest"]["steps"]
    assert {"python-version": oldest[1]} in [step.get("with") for step in steps]
    assert any("lockstep suites run --suite cpu" in step.get("run", "") for step in steps)


def test_gates_that_have_no_machine_are_said_to_be_left_out() -> None:
    jobs = workflow("nightly.yml")["jobs"]
    assert jobs["gates"]["if"] == "vars.LOCKSTEP_GATES_RUNNER != ''"
    assert jobs["gates-left-out"]["if"] == "vars.LOCKSTEP_GATES_RUNNER == ''"
    assert "left out: the gates" in jobs["gates-left-out"]["steps"][0]["run"]


def test_code_of_pull_requests_waits_for_a_reviewer_before_it_reaches_a_machine_of_ours(
    ci: dict[Any, Any],
) -> None:
    for suite in open_project(PROJECT).suites.values():
        given = ci["jobs"][suite.platform]["with"].get("environment")
        is_hosted = suite.platform in ("cpu", "sim")
        assert given == (None if is_hosted else "${{ github.event_name == 'pull_request' && 'devices' || '' }}")
    assert workflow("platform.yml")["jobs"]["part"]["environment"] == "${{ inputs.environment }}"


def test_the_workflows_start_when_they_should() -> None:
    ci = workflow("ci.yml")[ON]
    assert set(ci) == {"push", "pull_request", "workflow_dispatch", "workflow_call"}
    assert set(ci["workflow_dispatch"]["inputs"]) == set(ci["workflow_call"]["inputs"]) == INPUTS
    nightly = workflow("nightly.yml")
    assert nightly[ON]["schedule"]
    assert nightly["jobs"]["suites"] == {
        "uses": "./.github/workflows/ci.yml",
        "with": {"target_stage": "all", "run_all_tests": True},
    }
    wheels = workflow("wheels.yml")["jobs"]["wheels"]["strategy"]["matrix"]["include"]
    assert {each["name"] for each in wheels} == {"linux-x86_64", "linux-aarch64", "macos-arm64"}


def test_workflows_may_only_read_and_leave_no_token_behind() -> None:
    for path in WORKFLOWS.glob("*.yml"):
        found = workflow(path.name)
        assert found["permissions"] == {"contents": "read"}, path.name
        steps = [step for job in found["jobs"].values() for step in job.get("steps", ())]
        for step in steps:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False, path.name


def test_scripts_that_workflows_name_exist_and_parse() -> None:
    named = {
        name
        for path in [*WORKFLOWS.glob("*.yml"), *SCRIPTS.glob("*.sh")]
        for name in re.findall(r"scripts/ci/([\w.]+\.(?:sh|py))", path.read_text("utf-8"))
    }
    assert len(named) >= 6
    for name in named:
        assert (SCRIPTS / name).is_file(), name
    for path in SCRIPTS.glob("*.sh"):
        done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_each_platform_is_installed_and_asked_for_its_device() -> None:
    jobs = workflow("ci.yml")["jobs"]
    for suite in open_project(PROJECT).suites.values():
        script = SCRIPTS / f"install_{jobs[suite.platform]['with']['install']}.sh"
        assert f"require_platform {suite.platform}\n" in script.read_text("utf-8")
