"""Runs of small projects: what is green, what is not, and each way in which such a system could lie."""

from __future__ import annotations

import time
from pathlib import Path
from xml.etree import ElementTree

import psutil
import pytest
from suite_project import by_test, make_project, run_project, statuses

from lockstep.ci.parts import load_durations
from lockstep.ci.plan import Part
from lockstep.ci.registry import load_registry

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
    assert load_durations(tmp_path / "report" / "durations.json") == durations, "kept beside the report too"


def test_a_verdict_is_not_excused_by_what_the_clean_up_met(tmp_path: Path) -> None:
    """The lie: an accuracy below its threshold, and a port in use on the way out."""
    failure = f"""
            try:
                assert 0.41 > 0.6, "accuracy"
            finally:
                {PORT_IN_USE}"""
    report = run_project(make_project(tmp_path, {"test_a.py": FAILS_ONCE.format(failure=failure)}))
    (result,) = report.results
    assert (result.status, report.exit_code) == ("flaky", 1)
    assert result.attempts[0].infrastructure is None


def test_what_is_collected_and_not_listed_is_not_green(tmp_path: Path) -> None:
    files = {
        "shared_cases.py": "from other_cases import *",
        "other_cases.py": "globals()['test_shared'] = lambda: None",
        "test_a.py": "from shared_cases import *\ndef test_a(): pass",
        "test_b.py": "globals()['test_x'] = lambda: None\ndef test_b(): pass",
        "test_c.py": "class Base: pass\nclass TestC(Base):\n    def test_c(self): pass\n    test_d = test_c",
    }
    registry = make_project(tmp_path, files)
    assert registry.problems == ()
    report = run_project(registry, continue_on_error=True)
    failed = {result.test: result.attempts[0].text for result in report.results if result.status == "failed"}
    assert report.exit_code == 1 and failed == {
        "tests/test_a.py": "tests/test_a.py::test_shared was collected, and the text of the file does not show it",
        "tests/test_b.py": "tests/test_b.py::test_x was collected, and the text of the file does not show it",
    }


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        (
            "def pytest_pycollect_makeitem(name): return [] if name == 'test_b' else None",
            "tests/test_b.py::test_b is listed, and pytest did not collect it",
        ),
        (
            "def pytest_collection_modifyitems(items): items[:] = [i for i in items if i.name != 'test_b']",
            "tests/test_b.py::test_b was collected, and a hook dropped it",
        ),
    ],
)
def test_what_is_listed_and_vanishes_is_not_green(hook: str, said: str, tmp_path: Path) -> None:
    files = {"conftest.py": hook, "test_a.py": PASSES, "test_b.py": "def test_b(): pass\ndef test_c(): pass"}
    report = run_project(make_project(tmp_path, files), continue_on_error=True)
    assert report.exit_code == 1
    (lost,) = [each for each in report.results if each.status == "failed"]
    assert lost.test == "tests/test_b.py" and said in lost.attempts[0].text


def test_a_file_that_skips_itself_is_listed_with_its_reason(tmp_path: Path) -> None:
    files = {
        "test_a.py": PASSES,
        "test_b.py": "nothing = pytest.importorskip('nothing_of_this_name')\ndef test_b(): pass",
    }
    registry = make_project(tmp_path, files)
    report = run_project(registry)
    assert report.exit_code == 0 and statuses(report) == {"test_a": "passed"}
    ((test, reason),) = report.suites[0].not_run
    assert test == "tests/test_b.py::test_b" and "could not import 'nothing_of_this_name'" in reason
    (tmp_path / "tests" / "test_a.py").unlink()
    assert run_project(load_registry(registry.project)).exit_code == 5, "nothing but a file that skips itself"


def test_a_success_that_was_not_expected_is_not_green(tmp_path: Path) -> None:
    text = "@pytest.mark.xfail(reason='soon')\ndef test_a(): pass\n@pytest.mark.xfail\ndef test_b(): assert 0"
    report = run_project(make_project(tmp_path, {"test_a.py": text}), continue_on_error=True)
    assert statuses(report) == {"test_a": "failed", "test_b": "skipped"} and report.exit_code == 1
    assert "take the mark away" in by_test(report)["test_a"].attempts[0].text


def test_a_budget_of_flaky_tests_does_not_need_to_be_told_to_go_on(tmp_path: Path) -> None:
    files = {"test_a.py": FAILS_ONCE.format(failure="assert False"), "test_b.py": "def test_b(): pass"}
    report = run_project(make_project(tmp_path, files), flaky_budget=1, num_lanes=1)
    assert statuses(report) == {"test_sometimes": "flaky", "test_b": "passed"}
    assert (report.exit_code, report.stopped) == (0, False)
    root = ElementTree.parse(tmp_path / "report" / "junit.xml")
    assert not root.findall(".//failure") and not root.findall(".//error")


def test_exclusive_tests_are_run_again_alone(tmp_path: Path) -> None:
    text = """
        import os
        import pytest
        from pathlib import Path
        pytestmark = pytest.mark.suite("cpu")
        def note(name):
            with Path("order").open("a") as stream:
                stream.write(f"{name} {os.getpid()}\\n")
            assert False
        @pytest.mark.suite("cpu", exclusive=True)
        def test_alone(): note("alone")
        def test_one(): note("one")
        def test_two(): note("two")
    """
    report = run_project(make_project(tmp_path, {"test_a.py": text}), continue_on_error=True)
    assert report.exit_code == 1
    lines = [line.split() for line in (tmp_path / "order").read_text().splitlines()]
    again = dict(lines[3:])
    assert set(again) == {"alone", "one", "two"}
    assert again["one"] == again["two"] != again["alone"]


def test_processes_that_a_test_leaves_behind_end_with_its_process(tmp_path: Path) -> None:
    text = """
        import subprocess
        from pathlib import Path
        def test_a():
            left = subprocess.Popen(["sleep", "77"])
            Path("left").write_text(str(left.pid))
    """
    assert run_project(make_project(tmp_path, {"test_a.py": text})).exit_code == 0
    left = int((tmp_path / "left").read_text())
    deadline_s = time.monotonic() + 10
    while psutil.pid_exists(left) and psutil.Process(left).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_filter_starts_no_process_for_what_it_does_not_take(tmp_path: Path) -> None:
    mark = 'import pytest\npytestmark = pytest.mark.suite("cpu", exclusive=True)\ndef test_{}(x=0): pass'
    files = {f"test_{name}.py": mark.format(name) for name in "abcd"}
    report = run_project(make_project(tmp_path, files), keyword="test_c")
    assert statuses(report) == {"test_c": "passed"} and report.exit_code == 0
    logs = {path.name for path in (tmp_path / "report" / "logs").glob("*.log")}
    assert logs == {"collect-cpu.log", "alone0-0.log"}
