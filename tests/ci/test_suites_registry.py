"""Every test belongs to a suite, in this project and in any other; the lists say so."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
from suite_project import make_project

from lockstep.ci.listing import listed, suite_sizes
from lockstep.ci.marks import Disabled
from lockstep.ci.parts import Durations
from lockstep.ci.project import open_project
from lockstep.ci.registry import RegistryError, load_registry
from lockstep.cli.main import main
from lockstep.core.errors import ConfigError

pytestmark = pytest.mark.suite("cpu")

PROJECT = Path(__file__).parents[2]


def test_every_test_of_this_project_belongs_to_a_suite() -> None:
    registry = load_registry(open_project(PROJECT))
    assert registry.problems == ()
    assert len(registry.files) > 100
    assert all(file.mark_of(test) is not None for file in registry.files for test in file.tests)


def test_the_registry_has_the_files_that_pytest_collects() -> None:
    """Of a folder whose imports are quick."""
    folder = "tests/scheduler"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "--stage",
        "all",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run([*command, folder], cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    collected = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    files = load_registry(open_project(PROJECT)).files
    assert collected == {file.path for file in files if file.path.startswith(f"{folder}/")}


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("test_b.py", "def test_b(): pass", "test_b.py belongs to no suite"),
        (
            "test_b.py",
            'import pytest\n@pytest.mark.suite("cpu")\ndef test_a(): pass\ndef test_b(): pass',
            "test_b.py: test_b belongs to no suite",
        ),
        ("check_b.py", "def test_b(): pass", "check_b.py defines test_b, but pytest does not collect"),
        (
            "check_b.py",
            "class TestY:\n    def test_b(self): pass",
            "check_b.py defines TestY::test_b, but pytest does not collect",
        ),
        (
            "test_b.py",
            "import unittest\nclass Arith(unittest.TestCase):\n    def test_b(self): pass",
            "test_b.py belongs to no suite",
        ),
        ("test_b.py", "from shared_cases import *", "test_b.py belongs to no suite"),
        ("test_b.py", 'globals()["test_b"] = print', "test_b.py belongs to no suite"),
        ("test_b.py", "", "test_b.py belongs to no suite"),
        (
            "test_b.py",
            'import pytest\npytestmark = pytest.mark.suite("cpu")\nfrom shared_cases import *',
            "shows no test; define some, or import them by name",
        ),
        (
            "test_b.py",
            'import pytest\n@pytest.mark.suite("cpu")\nclass TestB:\n'
            "    def __init__(self): pass\n    def test_b(self): pass",
            "test_b.py:4: TestB has a constructor, so pytest would not collect it",
        ),
        (
            "test_b.py",
            'import pytest\npytestmark = pytest.mark.suite("cpu")\ndef test_b(): pass\ndef test_b(): pass',
            "test_b.py:4: a second test_b: the first, in line 3, never runs",
        ),
        (
            "test_b.py",
            'import pytest\npytestmark = pytest.mark.suite("cpu")\nfrom a import test_b\ndef test_b(): pass',
            "test_b.py:4: a second test_b",
        ),
        (
            "test_b.py",
            'import pytest\npytestmark = pytest.mark.suite("cpu")',
            "states a suite but its text shows no test",
        ),
        (
            "test_b.py",
            'import pytest\npytestmark = pytest.mark.suite("c")\ndef test_b(): pass',
            "unknown suite 'c'",
        ),
    ],
)
def test_a_test_that_is_registered_nowhere_is_a_problem(
    name: str, text: str, problem: str, tmp_path: Path
) -> None:
    """Nothing is planned or run, and the list exits with 1."""
    make_project(tmp_path, {"test_a.py": "def test_a(): pass"}, suites=["cpu"])
    (tmp_path / "tests" / name).write_text(text)
    registry = load_registry(open_project(tmp_path))
    (found,) = registry.problems
    assert problem in found
    with pytest.raises(RegistryError, match=r"test_b|check_b"):
        registry.require_sound()
    assert main(["suites", "list", "--root", str(tmp_path)]) == 1
    assert main(["suites", "plan", "--root", str(tmp_path)]) != 0
    assert main(["suites", "run", "--suite", "cpu", "--root", str(tmp_path)]) != 0


def test_a_test_file_outside_the_test_folders_is_a_problem(tmp_path: Path) -> None:
    make_project(tmp_path, {"test_a.py": "def test_a(): pass"}, suites=["cpu"])
    planted = tmp_path / "bench" / "x" / "test_planted.py"
    planted.parent.mkdir(parents=True)
    planted.write_text("def test_planted(): pass")
    (tmp_path / ".gitignore").write_text("scratch/\n")
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "test_mine.py").write_text("def test_mine(): pass")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    problems = load_registry(open_project(tmp_path)).problems
    assert problems == ("bench/x/test_planted.py lies in no test folder (testpaths)",)


def test_a_file_that_is_no_text_is_a_problem_and_no_crash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_project(tmp_path, {"test_a.py": "def test_a(): pass"}, suites=["cpu"])
    (tmp_path / "tests" / "test_b.py").write_bytes(b"# \xff\xfe\n")
    assert main(["suites", "list", "--root", str(tmp_path)]) == 1
    assert "problem: tests/test_b.py is not UTF-8" in capsys.readouterr().err


def test_helpers_may_be_called_like_tests(tmp_path: Path) -> None:
    helper = "class TestPlatform(Base):\n    name = 'x'\nclass TestResult:\n    __test__ = False\n"
    registry = make_project(tmp_path, {"test_a.py": "def test_a(): pass", "helper.py": helper})
    assert registry.problems == ()


def test_a_suite_without_tests_per_commit_is_a_problem_and_one_without_nightly_ones_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_project(tmp_path, {"test_a.py": "def test_a(): pass"}, suites=["cpu"])
    assert main(["suites", "list", "--root", str(tmp_path)]) == 0
    assert "nothing more at night: cpu\n" in capsys.readouterr().out
    make_project(tmp_path, {}, suites=["cpu", "sim"])
    assert main(["suites", "list", "--root", str(tmp_path)]) == 1
    assert "problem: suite sim has no test in stage per-commit" in capsys.readouterr().err
    assert main(["suites", "plan", "--root", str(tmp_path)]) == 5
    assert main(["suites", "plan", "--stage", "all", "--root", str(tmp_path)]) == 5


def test_a_file_registered_twice_runs_once(tmp_path: Path) -> None:
    """A suite named twice is an error of the mark; folders that overlap make one entry."""
    registry = make_project(tmp_path, {"inner/test_a.py": "def test_a(): pass"})
    text = (tmp_path / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(text.replace('["tests"]', '["tests", "tests/inner", "tests"]'))
    registry = load_registry(open_project(tmp_path))
    assert [job.target for job in registry.jobs(["cpu", "cpu"], "all", Durations())] == [
        "tests/inner/test_a.py"
    ]


def test_jobs_by_suite_and_stage(tmp_path: Path) -> None:
    text = """
        import pytest
        pytestmark = pytest.mark.suite("cpu", "sim", seconds=3)
        def test_a(): pass
        def test_b(): pass
        @pytest.mark.suite("cpu", stage="nightly", seconds=50)
        def test_long(): pass
        @pytest.mark.suite("cpu", exclusive=True, seconds=2)
        def test_alone(): pass
        @pytest.mark.suite("null", disabled="breaks", issue="https://example.org", since="2026-01-01")
        def test_disabled(): pass
    """
    registry = make_project(tmp_path, {"test_a.py": text})

    def jobs(suite: str, stage: str, durations: Durations) -> dict[str, tuple[float, bool]]:
        return {job.target: (job.seconds, job.exclusive) for job in registry.jobs([suite], stage, durations)}

    alone = "tests/test_a.py::test_alone"
    assert jobs("cpu", "per-commit", Durations()) == {"tests/test_a.py": (3, False), alone: (2, True)}
    assert jobs("cpu", "nightly", Durations()) == {"tests/test_a.py": (50, False)}
    assert jobs("sim", "all", Durations()) == {"tests/test_a.py": (3, False)}
    assert jobs("null", "all", Durations()) == {}
    measured = Durations({"cpu": {"tests/test_a.py": {"per-commit": 7.0}, alone: {"per-commit": 0.5}}})
    assert jobs("cpu", "all", measured) == {"tests/test_a.py": (57, False), alone: (0.5, True)}
    with pytest.raises(ConfigError, match="unknown suite 'cpuu'; did you mean 'cpu'"):
        registry.jobs(["cpuu"], "all", Durations())


def test_disabled_tests_show_with_reason_and_age(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = 'suite("cpu", disabled="it waits for ever", issue="https://example.org/7", since="2026-01-01")'
    text = f"import pytest\n@pytest.mark.{mark}\ndef test_b(): pass"
    files = {"test_a.py": "def test_a(): pass", "test_b.py": text}
    registry = make_project(tmp_path, files, suites=["cpu"])
    (row,) = [each for each in listed(registry) if each.mark.disabled is not None]
    assert row.mark.disabled == Disabled("it waits for ever", "https://example.org/7", date(2026, 1, 1))
    assert row.disabled_json(date(2026, 3, 1))["age_days"] == 31 + 28
    assert main(["suites", "list", "--root", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "it waits for ever" in shown and "https://example.org/7" in shown and "disabled for" in shown


def test_the_list_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_project(tmp_path, {"test_a.py": "def test_a(): pass\ndef test_b(): pass"}, suites=["cpu"])
    assert main(["suites", "list", "--json", "--root", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    (file,) = found["files"]
    assert (file["path"], file["suites"], file["platforms"], file["tests"]) == (
        "tests/test_a.py",
        ["cpu"],
        ["cpu"],
        2,
    )
    assert found["problems"] == [] and [each["suite"] for each in found["suites"]] == ["cpu"]


def test_this_project_has_the_promised_suites() -> None:
    registry = load_registry(open_project(PROJECT))
    sizes = {each["suite"]: (each["platform"], each["devices"]) for each in suite_sizes(registry)}
    assert (
        sizes.items()
        >= {
            "cpu": ("cpu", 1),
            "sim": ("sim", 1),
            "cuda-1": ("cuda", 1),
            "cuda-2": ("cuda", 2),
            "rocm-1": ("rocm", 1),
            "musa-1": ("musa", 1),
            "musa-2": ("musa", 2),
        }.items()
    )


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[tool.lockstep.testing]\n", "states no suites"),
        ("[tool.lockstep.testing.suites.a]\n", "platform"),
        (
            '[tool.lockstep.testing.suites.a]\nplatform = "cpu"\ndevice = 2\n',
            "no key 'device'; did you mean 'devices'",
        ),
        ('[tool.lockstep.testing.suites.a]\nplatform = "cpu"\ndevices = "two"\n', "devices"),
        ('[tool.lockstep.testing.suites.a]\nplatform = "cpu"\ndevices = 0\n', "at least 1, not 0"),
        ('[tool.lockstep.testing.suites.a]\nplatform = "cpu"\ndevices = -3\n', "at least 1, not -3"),
        ('[tool.lockstep.testing.suites.a]\nplatform = "cude"\n', "'cude'; did you mean 'cuda'"),
        (
            '[tool.lockstep.testing]\nseconds_per_test = 0\n[tool.lockstep.testing.suites.a]\nplatform = "cpu"\n',
            "seconds_per_test must be above 0",
        ),
        ("[tool.lockstep", r"pyproject\.toml cannot be read"),
        (
            "[tool.lockstep.testing]\nloadin = []\n[tool.lockstep.testing.suites.a]\nplatform='cpu'\n",
            "'loading'",
        ),
    ],
)
def test_wrong_tables_are_refused(table: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(table)
    with pytest.raises(ConfigError, match=message):
        open_project(tmp_path)


def test_a_project_without_suites_is_said_to_have_none(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    with pytest.raises(ConfigError, match=r"no pyproject.toml with \[tool.lockstep.testing\]"):
        open_project(tmp_path)


def test_pytest_s_names_of_tests_are_read_where_pytest_reads_them(tmp_path: Path) -> None:
    make_project(tmp_path, {"test_a.py": ""}, suites=["cpu"])
    options = '[tool.pytest.ini_options]\npython_functions = "check_* prove"\npython_classes = ["Checks"]\n'
    text = (tmp_path / "pyproject.toml").read_text().replace("[tool.pytest.ini_options]\n", options)
    (tmp_path / "pyproject.toml").write_text(text)
    (tmp_path / "tests" / "test_a.py").write_text(
        'import pytest\npytestmark = pytest.mark.suite("cpu")\ndef check_a(): ...\ndef proves(): ...\n'
        "def test_b(): ...\nclass ChecksC:\n    def prove(self): ...\n"
    )
    (file,) = load_registry(open_project(tmp_path)).files
    assert file.tests == ("check_a", "proves", "ChecksC::prove")
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_functions = x\n")
    with pytest.raises(ConfigError, match=r"pytest\.ini hides pytest's options in pyproject\.toml"):
        open_project(tmp_path)
