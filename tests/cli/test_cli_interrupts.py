"""Ctrl-C at many moments of a command's life, found by what has been imported, not by the clock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from lockstep.cli.interrupts import prompt_interrupts

pytestmark = pytest.mark.suite("cpu")

RUN = ["-m", "lockstep.cli.main", "run", "Tell me a long story.", "--max-tokens", "4000"]


def reading(process: subprocess.Popen[str]) -> Iterator[str]:
    """Names of modules, as their imports end."""
    assert process.stderr is not None
    for line in process.stderr:
        yield line.rpartition("|")[2].strip()


@pytest.mark.parametrize(
    "module",
    [
        "click",
        "lockstep.cli.group",
        "lockstep.config",
        "torch._C",
        "torch",
        "lockstep.engine.llm",
        "jinja2",
    ],
)
def test_control_c_during_imports_ends_the_command(module: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", *RUN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert any(name == module for name in reading(process)), f"{module} was never imported"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err and "leaked" not in err
    assert len(out) < 4000, "it went on to its end"


def test_control_c_during_the_answer_ends_the_command() -> None:
    with subprocess.Popen([sys.executable, *RUN], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (130, b"")


def test_an_import_that_swallows_everything_does_not_swallow_control_c(
    tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "swallows_everything"
    with open(os.path.join(tmp_path, f"{name}.py"), "w") as file:
        file.write("import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    sum(range(1000))\n")
        file.write("except BaseException:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = signal.getsignal(signal.SIGALRM)
    try:
        with pytest.raises(KeyboardInterrupt), prompt_interrupts():
            __import__(name)
            threading.Event().wait(10)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert name in sys.modules, "the import was done first"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_others_who_handle_the_signal_are_left_alone() -> None:
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with prompt_interrupts():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, ignored)
