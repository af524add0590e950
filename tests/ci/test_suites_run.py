"""Runs of small projects: what is green, what is not, and each way in which such a system could lie."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from suite_project import by_test, make_project, run_project, statuses

from lockstep.ci.parts import load_durations
from lockstep.ci.plan import Part

pytestmark = pytest.mark.suite("cpu")


@pytest.fixture(autouse=True)
def few_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugins of this environment would take most of the time of such small runs."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


PASSES = "def test_a(): pass"
FAILS_ONCE = """
    from pathlib import Path
    def test_sometimes():
        first = not Path("second").exists()
        Path("second").touch()
        if first:
            {failure}
"""
PORT_IN_USE = "raise OSError(98, 'x')"


def test_a_run_that_passes(tmp_path: Path) -> None:
    registry = make_project(tmp_path, {"test_a.py": PASSES, "test_b.py": "def test_b(): pass"})
    report = run_project(registry, num_lanes=2)
    assert statuses(report) == {"test_a": "passed", "test_b": "passed"}
    assert report.exit_code == 0


def test_a_suite_that_selects_nothing_is_not_green(tmp_path: Path) -> None:
    registry = make_project(tmp_path, {"test_a.py": PASSES})
    assert run_project(registry, "sim").exit_code == 5
    both = run_project(registry, "cpu", "sim")
    assert both.exit_code == 5 and [suite.verdict for suite in both.suites] == ["passed", "nothing ran"]
    assert run_project(registry, keyword="nothing_has_this_name").exit_code == 5
    assert run_project(registry, stage="nightly").exit_code == 5


def test_a_suite_that_only_skips_is_not_green(tmp_path: Path) -> None:
    registry = make_project(tmp_path, {"test_a.py": "def test_a(): pytest.skip('not today')"})
    report = run_project(registry)
    assert report.exit_code == 5 and statuses(report) == {"test_a": "skipped"}


def test_a_suite_without_its_devices_says_what_it_needs(tmp_path: Path) -> None:
    text = 'import pytest\npytestmark = pytest.mark.suite("cpu-2")\ndef test_a(): pass'
    report = run_project(make_project(tmp_path, {"test_a.py": text}), "cpu-2")
    assert report.exit_code == 5
    assert report.suites[0].missing == "needs 2 cpu devices, this machine has 1"


def test_a_test_that_needs_what_the_device_lacks_is_listed_and_not_green(tmp_path: Path) -> None:
    text = 'import pytest\npytestmark = pytest.mark.suite("null", needs=("fp8",))\ndef test_a(): pass'
    report = run_project(make_project(tmp_path, {"test_a.py": text}), "null")
    assert report.exit_code == 5
    ((test, reason),) = report.suites[0].not_run
    assert test == "tests/test_a.py::test_a" and reason.startswith("needs fp8, which ")


def test_disabled_tests_do_not_run_and_are_listed(tmp_path: Path) -> None:
    text = """
        import pytest
        pytestmark = pytest.mark.suite("cpu")
        def test_a(): pass
        @pytest.mark.suite("cpu", disabled="breaks", issue="https://example.org", since="2026-01-01")
        def test_b(): assert False
    """
    report = run_project(make_project(tmp_path, {"test_a.py": text}))
    assert report.exit_code == 0 and statuses(report) == {"test_a": "passed"}
    assert report.suites[0].not_run == [("tests/test_a.py::test_b", "disabled since 2026-01-01: breaks")]


def test_a_failure_stops_the_run_unless_told_to_go_on(tmp_path: Path) -> None:
    registry = make_project(
        tmp_path, {"test_a.py": "def test_a(): assert 1 == 2", "test_b.py": "def test_b(): pass"}
    )
    report = run_project(registry)
    assert (statuses(report), report.stopped, report.exit_code) == ({"test_a": "failed"}, True, 1)
    report = run_project(registry, continue_on_error=True)
    assert statuses(report) == {"test_a": "failed", "test_b": "passed"}
    assert (report.stopped, report.exit_code) == (False, 1)
    assert "assert 1 == 2" in by_test(report)["test_a"].attempts[0].text


def test_a_failure_of_the_machine_is_tried_again(tmp_path: Path) -> None:
    registry = make_project(tmp_path, {"test_a.py": FAILS_ONCE.format(failure=PORT_IN_USE)})
    report = run_project(registry)
    (result,) = report.results
    assert (result.status, report.exit_code, report.num_flaky) == ("recovered", 0, 0)
    assert [attempt.infrastructure for attempt in result.attempts] == ["port in use", None]


def test_a_failure_of_the_machine_is_tried_again_twice_at_most(tmp_path: Path) -> None:
    registry = make_project(tmp_path, {"test_a.py": f"def test_a(): {PORT_IN_USE}"})
    report = run_project(registry)
    (result,) = report.results
    assert (len(result.attempts), result.status, report.exit_code) == (3, "failed", 1)


def test_a_text_that_sounds_like_the_machine_is_not_the_machine(tmp_path: Path) -> None:
    """The lie: a rule that finds "oom" in "room"."""
    failure = "raise RuntimeError('no room: CUDA out of memory, oom, address already in use, connection reset')"
    registry = make_project(tmp_path, {"test_a.py": FAILS_ONCE.format(failure=failure)})
    report = run_project(registry)
    (result,) = report.results
    assert (result.status, report.exit_code) == ("flaky", 1)
    assert result.attempts[0].infrastructure is None


@pytest.mark.parametrize("failure", ["assert 0.61 > 0.62, 'accuracy'", "pytest.fail('too slow')"])
def test_a_judgement_is_never_tried_into_green(failure: str, tmp_path: Path) -> None:
    registry = make_project(tmp_path, {"test_a.py": FAILS_ONCE.format(failure=failure)})
    report = run_project(registry)
    assert statuses(report) == {"test_sometimes": "flaky"} and report.exit_code == 1
    assert [attempt.outcome for attempt in report.results[0].attempts] == ["failed", "passed"]
    (tmp_path / "second").unlink()
    allowed = run_project(registry, flaky_budget=1, continue_on_error=True)
    assert statuses(allowed) == {"test_sometimes": "flaky"} and allowed.exit_code == 0


def test_the_machine_excuses_its_own_phase_only(tmp_path: Path) -> None:
    """A test that is wrong and whose tear-down then finds a port in use has failed by itself."""
    text = f"""
        @pytest.fixture
        def port():
            yield
            {PORT_IN_USE}
        def test_a(port): assert False
        def test_b(port): pass
    """
    report = run_project(make_project(tmp_path, {"test_a.py": text}), continue_on_error=True)
    first = {name: result.attempts[0].infrastructure for name, result in by_test(report).items()}
    assert first == {"test_a": None, "test_b": "port in use"}
    assert set(statuses(report).values()) == {"failed"}


def test_memory_counts_only_where_models_are_loaded(tmp_path: Path) -> None:
    files = {
        "loader.py": "def load(): raise MemoryError",
        "test_a.py": "import loader\ndef test_loads(): loader.load()\ndef test_computes(): raise MemoryError",
    }
    report = run_project(make_project(tmp_path, files), continue_on_error=True)
    first = {name: result.attempts[0].infrastructure for name, result in by_test(report).items()}
    assert first == {"test_loads": "out of memory while loading", "test_computes": None}


def test_a_process_that_dies_fails_its_test_and_the_others_still_run(tmp_path: Path) -> None:
    text = """
        import os
        def test_1(): pass
        def test_2(): os._exit({code})
        def test_3(): pass
    """
    files = {
        "test_a.py": text.format(code=0),
        "test_b.py": "import os\ndef test_last(): os.kill(os.getpid(), 11)",
    }
    report = run_project(make_project(tmp_path, files), continue_on_error=True)
    assert statuses(report) == {
        "test_1": "passed",
        "test_2": "failed",
        "test_3": "passed",
        "test_last": "failed",
    }
    assert report.exit_code == 1
    assert "ended with code 0" in by_test(report)["test_2"].attempts[0].text
    assert "signal 11 (SIGSEGV)" in by_test(report)["test_last"].attempts[0].text


def test_a_process_that_dies_after_its_tests_is_not_green(tmp_path: Path) -> None:
    text = "import atexit, os\ndef test_a(): atexit.register(os._exit, 9)"
    report = run_project(make_project(tmp_path, {"test_a.py": text}))
    assert report.exit_code == 1 and "ended with code 9" in report.results[0].attempts[0].text


def test_a_file_that_cannot_be_imported_is_not_green(tmp_path: Path) -> None:
    files = {"test_a.py": "import nothing_of_this_name\ndef test_a(): pass", "test_b.py": "def test_b(): pass"}
    report = run_project(make_project(tmp_path, files), continue_on_error=True)
    assert statuses(report)["test_b"] == "passed" and report.exit_code == 1
    assert (
        "nothing_of_this_name"
        in next(each for each in report.results if each.status == "failed").attempts[0].text
    )


def test_what_takes_too_long_fails(tmp_path: Path) -> None:
    text = "import time\ndef test_a(): time.sleep(60)\ndef test_b(): pass"
    begin_s = time.monotonic()
    report = run_project(
        make_project(tmp_path, {"test_a.py": text}), continue_on_error=True, timeout_per_test_s=0.5
    )
    assert statuses(report) == {"test_a": "failed", "test_b": "passed"}
    assert "took longer than 0.5 s" in by_test(report)["test_a"].attempts[0].text
    assert time.monotonic() - begin_s < 30


def test_exclusive_tests_run_alone_after_the_others(tmp_path: Path) -> None:
    note = """
        import os
        from pathlib import Path
        def note(name):
            with Path("order").open("a") as stream:
                stream.write(f"{name} {os.getpid()}\\n")
    """
    text = """
        import pytest
        from note import note
        pytestmark = pytest.mark.suite("cpu")
        @pytest.mark.suite("cpu", exclusive=True)
        def test_alone(): note("alone")
        def test_together(): note("together")
    """
    other = "from note import note\ndef test_other(): note('other')"
    report = run_project(make_project(tmp_path, {"note.py": note, "test_a.py": text, "test_b.py": other}))
    assert report.exit_code == 0 and len(report.results) == 3
    names, processes = zip(
        *(line.split() for line in (tmp_path / "order").read_text().splitlines()), strict=True
    )
    assert names == ("together", "other", "alone") and processes[0] == processes[1] != processes[2]


def test_a_test_of_two_suites_runs_on_the_platform_of_each(tmp_path: Path) -> None:
    text = """
        import pytest
        pytestmark = pytest.mark.suite("cpu", "null")
        def test_a(suite_platform):
            with open("seen", "a") as stream:
                stream.write(suite_platform + " ")
    """
    report = run_project(make_project(tmp_path, {"test_a.py": text}), "cpu", "null", num_lanes=1)
    assert [(result.suite, result.test.rpartition("::")[2]) for result in report.results] == [
        ("cpu", "test_a[cpu]"),
        ("null", "test_a[null]"),
    ]
    assert sorted((tmp_path / "seen").read_text().split()) == ["cpu", "null"]


def test_parts_together_run_every_test_once(tmp_path: Path) -> None:
    files = {f"test_{name}.py": f"def test_{name}(): pass" for name in "abcde"}
    registry = make_project(tmp_path, files)
    reports = [run_project(registry, part=Part(number, 3)) for number in range(3)]
    assert all(report.exit_code == 0 for report in reports)
    assert sorted(result.test for report in reports for result in report.results) == [
        f"tests/test_{name}.py::test_{name}" for name in "abcde"
    ]
    assert run_project(registry, part=Part(7, 9)).exit_code == 5, "a part with nothing in it"
    assert run_project(registry, "cpu", "sim", part=Part(0, 3)).exit_code == 5, (
        "a suite with nothing in any part"
    )


def test_runs_measure_durations(tmp_path: Path) -> None:
    files = {
        "test_a.py": "import time\ndef test_a(): time.sleep(0.3)",
        "test_b.py": "def test_b(): assert False",
    }
    registry = make_project(tmp_path, files)
    report = run_project(registry, continue_on_error=True, update_durations=True)
    assert report.exit_code == 1
    durations = load_durations(registry.project.durations_path)
    measured = durations.get("cpu", "tests/test_a.py", "per-commit")
    assert measured is not None and 0.3 <= measured < 5
    assert durations.get("cpu", "tests/test_b.py", "per-commit") is None, "a failure takes no typical time"
