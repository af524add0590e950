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


def counted_by_hand(text: str) -> list[str]:
    """Lines that fix a number of parts, or list parts, instead of asking the plan."""
    return [
        line.strip()
        for line in text.splitlines()
        if re.search(r"(partitions?|partition-id|parts?|total)\b[\"': =]+\[?\s*\d", line)
        or re.search(r"matrix:\s*\{?\s*part", line)
    ]


def test_no_number_of_parts_is_kept_by_hand() -> None:
    for path in [*WORKFLOWS.glob("*.yml"), *SCRIPTS.glob("*.sh")]:
        assert counted_by_hand(path.read_text("utf-8")) == [], path.name
    strategy = workflow("platform.yml")["jobs"]["part"]["strategy"]
    assert strategy["matrix"] == {"include": "${{ fromJSON(inputs.parts) }}"} and not strategy["fail-fast"]


@pytest.mark.parametrize(
    "line",
    [
        "run: lockstep suites run --total-partitions 4",
        "matrix: { part: [0, 1, 2] }",
        "part: [0, 1]",
        "PARTS: 3",
        "total: '2'",
        "lockstep suites plan --total-partitions=8",
    ],
)
def test_a_number_kept_by_hand_is_found(line: str) -> None:
    assert counted_by_hand(line.lower()) == [line.lower()]


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
