"""The command as a process: help, exit codes, one line per mistake, quick and without torch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lockstep import __version__
from lockstep.cli.group import COMMANDS
from lockstep.config.components import ENGINE_OPTIONS, OPTIONS

pytestmark = pytest.mark.suite("cpu")

COMMAND = [sys.executable, "-m", "lockstep.cli.main"]


def lockstep(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LOCKSTEP_")}
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env={**inherited, **environ}, timeout=60
    )


@pytest.mark.suite("cpu", exclusive=True)
def test_help_lists_every_command_and_is_quick() -> None:
    times_s = []
    for _ in range(3):
        begin_s = time.perf_counter()
        done = lockstep("--help")
        times_s.append(time.perf_counter() - begin_s)
        assert done.returncode == 0 and done.stderr == ""
    for name, line in COMMANDS.items():
        assert name in done.stdout and line in done.stdout
    print(f"lockstep --help: best of 3 {min(times_s):.3f} s")
    assert min(times_s) < 0.3


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_are_no_fault(closed: str) -> None:
    command = f"{sys.executable} -m lockstep.cli.main --version {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("" if "1>" in closed else f"lockstep {__version__}\n")


def test_a_full_disk_is_no_fault() -> None:
    command = f"{sys.executable} -m lockstep.cli.main --version > /dev/full"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: the output cannot be written: No space left on device\n")


def test_no_arguments_is_help() -> None:
    done = lockstep()
    assert done.returncode == 0 and "Commands:" in done.stdout


def test_version() -> None:
    assert lockstep("--version").stdout == f"lockstep {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["run"], ["chat"], ["serve"], ["explain", "config"], ["bench", "serve"]]
)
def test_help_needs_no_torch_and_no_server(arguments: list[str]) -> None:
    code = (
        "import sys; blocked = ('torch', 'fastapi', 'rich', 'numpy')\n"
        "for name in blocked: sys.modules[name] = None\n"
        f"from lockstep.cli.main import main; sys.exit(main({[*arguments, '--help']!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: lockstep")


@pytest.mark.parametrize(
    "arguments", [["run"], ["chat"], ["serve"], ["explain", "memory"], ["bench", "latency"]]
)
def test_help_names_every_option_of_the_engine(arguments: list[str]) -> None:
    text = lockstep(*arguments, "--help").stdout
    missing = [o.flag for o in ENGINE_OPTIONS.values() if not o.positional and f"{o.flag}" not in text]
    assert missing == []
    assert "[MODEL]" in text


def test_serve_has_every_option() -> None:
    text = lockstep("serve", "--help").stdout
    assert [
        option.flag for option in OPTIONS.values() if not option.positional and option.flag not in text
    ] == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("srve", "unknown command 'srve'; did you mean 'serve'? (see `lockstep --help`)"),
        ("explain confg", "unknown command 'confg'; did you mean 'config'? (see `lockstep explain --help`)"),
        (
            "run x --temprature 1",
            "unknown option --temprature; did you mean '--temperature'? (see `lockstep run --help`)",
        ),
        ("serve --prot 1", "unknown option --prot; did you mean '--port'? (see `lockstep serve --help`)"),
        ("run", "missing argument 'PROMPT' (see `lockstep run --help`)"),
        ("run x --tp two", "--tp takes an integer from 1 up, not 'two'"),
        (
            "run x --dtype bf16",
            "--dtype takes one of auto, float32, bfloat16, float16, not 'bf16'; did you mean 'bfloat16'?",
        ),
        ("serve --port 70000", "--port takes an integer from 0 to 65535, not 70000"),
        ("run x --temperature -1", "--temperature must lie from 0 to 100, not -1.0"),
        ("run x --temperature nan", "--temperature must be a finite number, not nan"),
        ("run x --top-p 0", "--top-p must be above 0 and at most 1, not 0.0"),
        ("run x --regex a --ebnf setup.cfg", None),
        ("run x m extra", "got unexpected extra argument (extra) (see `lockstep run --help`)"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments: str, line: str | None) -> None:
    done = lockstep(*arguments.split())
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    if line is not None:
        assert done.stderr == f"error: {line}\n"


def test_a_wrong_variable_is_named() -> None:
    done = lockstep("serve", LOCKSTEP_PORT="http")
    assert done.returncode == 2
    assert done.stderr == "error: LOCKSTEP_PORT takes an integer from 0 to 65535, not 'http'\n"


def test_debugging_shows_the_traceback() -> None:
    done = lockstep("run", "x", "--tp", "two", LOCKSTEP_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ConfigError" in done.stderr


def test_a_reader_that_leaves_is_no_traceback(tmp_path: Path) -> None:
    script = f"{' '.join(COMMAND)} run --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", "1")
