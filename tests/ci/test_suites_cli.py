"""`lockstep suites plan` and `run`: what they print, and how they end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from suite_project import make_project

from lockstep.cli.main import main

pytestmark = pytest.mark.suite("cpu")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with four files, which is the present folder."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.chdir(tmp_path)
    mark = 'import pytest\npytestmark = pytest.mark.suite("cpu", seconds={})\ndef test_{}(): pass\n'
    make_project(
        tmp_path, {f"test_{name}.py": mark.format(len(name), name) for name in ("a", "bb", "ccc", "dddd")}
    )
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["suites", *arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.mark.usefixtures("root")
def test_plans_are_numbers_that_a_workflow_can_use(capsys: pytest.CaptureFixture[str]) -> None:
    """The lie: a number of jobs that somebody keeps by hand. Here it follows from the times."""
    code, out, _ = run(capsys, "plan", "--suite", "cpu", "--seconds-per-part", "5", "--json")
    (plan,) = json.loads(out)
    assert code == 0 and (plan["suite"], plan["total_partitions"], plan["seconds"]) == ("cpu", 2, 10.0)
    assert [part["seconds"] for part in plan["parts"]] == [5.0, 5.0]
    assert [part["files"] for part in plan["parts"]] == [
        ["tests/test_dddd.py", "tests/test_a.py"],
        ["tests/test_ccc.py", "tests/test_bb.py"],
    ]
    for seconds, parts in (("100", 1), ("4", 3), ("0.1", 3)):
        _, out, _ = run(capsys, "plan", "--suite", "cpu", "--seconds-per-part", seconds, "--json")
        assert json.loads(out)[0]["total_partitions"] == parts
    code, out, _ = run(capsys, "plan", "--suite", "cpu", "--total-partitions", "3")
    assert code == 0 and "0 of 3" in out and "2 of 3" in out and "tests/test_dddd.py (4 s)" in out


@pytest.mark.usefixtures("root")
def test_a_plan_of_nothing_exits_with_5(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "plan", "--suite", "sim")
    assert code == 5 and "suite sim has no test in stage per-commit" in err


def test_a_run_shows_files_and_writes_reports(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "run", "--suite", "cpu", "--report-dir", "found", "--partition-id", "1",
                       "--total-partitions", "2")  # fmt: skip
    assert code == 0 and "tests/test_ccc.py: 1 passed" in out and "test_dddd" not in out
    assert {path.name for path in (root / "found").iterdir()} == {
        "durations.json",
        "report.json",
        "junit.xml",
        "summary.md",
        "logs",
    }
    report = json.loads((root / "found" / "report.json").read_text())
    assert [each["test"] for each in report["suites"][0]["tests"]] == [
        "tests/test_bb.py::test_bb",
        "tests/test_ccc.py::test_ccc",
    ]
    assert report["machine"]["python"]


@pytest.mark.parametrize("option", [(), ("-k", "bb")])
def test_without_pytest_one_line_says_what_to_install(
    root: Path, option: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pytest", None)
    code, shown, said = run(capsys, "run", "--suite", "cpu", *option)
    assert (code, shown) == (2, "")
    assert said == 'error: running suites needs pytest: pip install -e ".[test]"\n'


def test_a_failed_run_shows_why(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = 'import pytest\npytestmark = pytest.mark.suite("cpu")\ndef test_a():\n    print("seed 7")\n    assert 1 == 2'
    (root / "tests" / "test_a.py").write_text(text)
    code, out, _ = run(capsys, "run", "--suite", "cpu", "-k", "test_a", "--jobs", "1")
    assert code == 1 and "assert 1 == 2" in out and "seed 7" in out and "attempt 2" in out
    code, out, _ = run(capsys, "run", "--suite", "cpu", "-k", "test_a", "--json")
    assert code == json.loads(out)["exit_code"] == 1


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "missing option '--suite'"),
        (["run", "--suite", "cpuu"], "unknown suite 'cpuu'; did you mean 'cpu'?"),
        (["run", "--suite", "cpu", "--partition-id", "0"], "go together"),
        (["run", "--suite", "cpu", "--partition-id", "2", "--total-partitions", "2"], "from 0 to 1, not 2"),
        (["run", "--suite", "cpu", "-k", "a", "--update-durations"], "leave out -k"),
        (["run", "--suite", "cpu", "--jobs", "0"], "--jobs"),
        (["run", "--suite", "cpu", "-k", "a and (b"], "-k 'a and (b' is no filter"),
        (["run", "--suite", "cpu", "--report-dir", "/proc/x"], "--report-dir /proc/x cannot be written"),
        (["plan", "--total-partitions", "0"], "at least 1 part, not 0"),
        (["plan", "--seconds-per-part", "0"], "above 0"),
        (["plna"], "unknown command 'plna'; did you mean 'plan'?"),
    ],
)
def test_bad_usage_exits_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2 and message in err and "Traceback" not in err and len(err.splitlines()) == 1


def test_an_ended_run_leaves_no_process_behind(root: Path) -> None:
    text = (
        'import pytest\npytestmark = pytest.mark.suite("cpu")\ndef test_a():\n    import time; time.sleep(100)'
    )
    (root / "tests" / "test_a.py").write_text(text)
    command = [sys.executable, "-m", "lockstep.cli.main", "suites", "run", "--suite", "cpu", "-k", "test_a"]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    runner = psutil.Process(process.pid)
    deadline_s = time.monotonic() + 60
    while not any("started" in path.read_text() for path in root.glob("build/suites/logs/*.jsonl")):
        assert time.monotonic() < deadline_s and process.poll() is None
        time.sleep(0.05)
    children = runner.children(recursive=True)
    process.terminate()
    assert process.wait(20) == 130
    _, alive = psutil.wait_procs(children, 5)
    assert children and not alive
    report = json.loads((root / "build" / "suites" / "report.json").read_text())
    assert report["interrupted"] and report["exit_code"] == 1
    (test,) = report["suites"][0]["tests"]
    assert test["status"] == "failed" and test["attempts"][0]["text"] == "the run was interrupted"
    assert "every test was reached" in (root / "build" / "suites" / "junit.xml").read_text()
