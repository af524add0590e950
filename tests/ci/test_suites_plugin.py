"""The plugin in pytest itself: with a suite, without one, and in projects that have none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from suite_project import PYPROJECT, make_project

pytestmark = pytest.mark.suite("cpu")


@pytest.fixture(autouse=True)
def few_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("-p", "lockstep.ci.plugin", *arguments)


MANY = """
    import pytest
    pytestmark = pytest.mark.suite("cpu", "null")
    def test_both(suite_platform): pass
    @pytest.mark.suite("null")
    def test_null(suite_platform): pass
    @pytest.mark.suite("cpu-2")
    def test_two(suite_platform): pass
    @pytest.mark.suite("cpu", stage="nightly")
    def test_long(): pass
    @pytest.mark.suite("cpu", disabled="breaks", issue="https://example.org", since="2026-01-01")
    def test_off(): pass
"""


def test_plain_pytest_takes_what_this_machine_can_run_and_says_what_it_leaves_out(
    pytester: pytest.Pytester,
) -> None:
    make_project(pytester.path, {"test_a.py": MANY})
    result = run(pytester, "-v")
    result.assert_outcomes(passed=3, deselected=3)
    result.stdout.fnmatch_lines_random(
        [
            "*::test_both?cpu? PASSED*",
            "*::test_both?null? PASSED*",
            "*::test_null?null? PASSED*",
            "1 not run: suite cpu-2 needs 2 cpu devices, this machine has 1",
            "1 not run: belongs to stage nightly",
            "1 not run: disabled since 2026-01-01: breaks (https://example.org)",
        ]
    )


@pytest.mark.parametrize(
    ("suite", "stage", "names"),
    [
        ("cpu", "per-commit", {"test_both[cpu]"}),
        ("cpu", "all", {"test_both[cpu]", "test_long"}),
        ("cpu", "nightly", {"test_long"}),
        ("null", "all", {"test_both[null]", "test_null[null]"}),
    ],
)
def test_a_suite_takes_its_own(suite: str, stage: str, names: set[str], pytester: pytest.Pytester) -> None:
    make_project(pytester.path, {"test_a.py": MANY})
    result = run(pytester, "--suite", suite, "--stage", stage, "--collect-only", "-q")
    assert {line.rpartition("::")[2] for line in result.outlines if "::" in line} == names


def test_a_suite_without_its_devices_selects_nothing_and_is_not_green(pytester: pytest.Pytester) -> None:
    make_project(pytester.path, {"test_a.py": MANY})
    result = run(pytester, "--suite", "cpu-2")
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    result.stdout.fnmatch_lines(["1 not run: suite cpu-2 needs 2 cpu devices, this machine has 1"])


def test_a_test_of_no_suite_is_an_error_where_a_suite_is_asked_for(pytester: pytest.Pytester) -> None:
    make_project(pytester.path, {"test_a.py": "def test_a(): pass"})
    (pytester.path / "tests" / "test_b.py").write_text("def test_b(): pass")
    result = run(pytester, "--suite", "cpu")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*test_b.py::test_b belongs to no suite*"])
    run(pytester).assert_outcomes(passed=2)


def test_an_unknown_suite_is_an_error_that_names_the_nearest(pytester: pytest.Pytester) -> None:
    make_project(pytester.path, {"test_a.py": "def test_a(): pass"})
    result = run(pytester, "--suite", "cpuu")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*unknown suite 'cpuu'; did you mean 'cpu'*"])


def test_it_leaves_other_projects_alone(pytester: pytest.Pytester) -> None:
    pytester.makepyprojecttoml("[project]\nname = 'other'\n")
    pytester.makepyfile("import pytest\n@pytest.mark.parametrize('x', [1])\ndef test_a(x): pass")
    run(pytester, "--strict-markers").assert_outcomes(passed=1)
    result = run(pytester, "--suite", "cpu")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*no ?tool.lockstep.testing? in*"])


def test_named_twice_it_is_loaded_once(pytester: pytest.Pytester) -> None:
    """By an entry point and by -p, as in this project."""
    make_project(pytester.path, {"test_a.py": "def test_a(): pass"})
    metadata = pytester.path / "site" / "other-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[pytest11]\nlockstep.ci.plugin = lockstep.ci.plugin\n")
    starter = (
        f"import sys; sys.path.insert(0, {str(metadata.parent)!r}); import pytest; sys.exit(pytest.main())"
    )
    for arguments in ((), ("-p", "lockstep.ci.plugin")):
        code = starter.replace("pytest.main()", f"pytest.main(['--suite', 'cpu', '-q', *{list(arguments)}])")
        environ = "import os; os.environ.pop('PYTEST_DISABLE_PLUGIN_AUTOLOAD'); "
        done = pytester.run(
            pytester.path.joinpath("python") if False else __import__("sys").executable, "-c", environ + code
        )
        assert done.ret == 0, done.stdout.str()


def test_events_say_what_happened(pytester: pytest.Pytester) -> None:
    text = "def test_a(): pass\ndef test_b(): pytest.skip('no wish')\ndef test_c(): assert 0"
    make_project(pytester.path, {"test_a.py": text})
    events = Path(pytester.path / "events.jsonl")
    run(pytester, "--suite", "cpu", "--suite-events", str(events))
    found = [json.loads(line) for line in events.read_text().splitlines()]
    tests = [f"tests/test_a.py::test_{name}" for name in "abc"]
    assert found[0] == {
        "event": "collected",
        "found": dict(zip(tests, tests, strict=True)),
        "tests": dict.fromkeys(tests, "per-commit"),
        "not_run": {},
        "later": [],
    }
    assert [each["test"] for each in found if each["event"] == "started"] == tests
    outcomes = {
        (each["test"][-1], each["phase"]): each["outcome"] for each in found if each["event"] == "phase"
    }
    assert (
        outcomes["a", "call"] == "passed"
        and outcomes["b", "call"] == "skipped"
        and outcomes["c", "call"] == "failed"
    )
    assert found[-1] == {"event": "finished", "code": 1}


def test_the_table_of_the_small_projects_is_this_project_s_kind() -> None:
    """What is tested here has the keys that the real pyproject.toml has."""
    real = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for line in PYPROJECT.splitlines():
        key = line.strip().partition(" = ")[0]
        assert key in real or "suites." in key, key
