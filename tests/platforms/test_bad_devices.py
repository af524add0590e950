"""Devices that are not there, cannot be used or are too small: one line on stderr that says what to do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.cli.main import main
from lockstep.core.errors import OutOfMemory
from lockstep.engine import build
from lockstep.engine.llm import LLM
from lockstep.platforms.registry import load_platform, pick_platform

pytestmark = pytest.mark.suite("cpu")

# As torch words them.
NO_DRIVER = (
    "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver from "
    "http://www.nvidia.com/Download/index.aspx"
)
HIDDEN = "No CUDA GPUs are available"
OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx\nAlternatively, go to: "
    "https://pytorch.org to install a PyTorch version that has been compiled with your version of the CUDA driver."
)
MISMATCH = (
    "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices() that "
    "might have already set an error? Error 803: system has unsupported display driver / cuda driver combination"
)
STATES = {
    NO_DRIVER: "no NVIDIA driver was found: install",
    HIDDEN: "see what `nvidia-smi -L` lists and CUDA_VISIBLE_DEVICES leaves of it",
    OLD_DRIVER: "serves CUDA up to 12.2, and this PyTorch was built for 13.0: install a newer driver, or a PyTorch",
    MISMATCH: "does not start (Error 803: system has unsupported display driver / cuda driver combination): see",
}
COMMANDS = (
    ("run", "Hello", "--device", "cuda"),
    ("chat", "--device", "cuda"),
    ("serve", "--device", "cuda"),
    ("bench", "throughput", "--device", "cuda"),
    ("explain", "memory", "--device", "cuda"),
    ("explain", "config", "--device", "cuda"),
    ("ops", "check", "--platform", "cuda"),
    ("ops", "explain", "--platform", "cuda"),
    ("ops", "bench", "rms_norm", "--platform", "cuda"),
)
Streams = pytest.CaptureFixture[str]


@pytest.fixture
def torch_says(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes this torch a build for CUDA 13.0 that can use no GPU and complains of it so."""

    def says(complaint: str) -> None:
        def fail() -> None:
            raise RuntimeError(complaint)

        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "init", fail)

    return says


def error_line(arguments: tuple[str, ...], capsys: Streams) -> str:
    """What a command that must be refused says."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("complaint", STATES)
def test_why_no_gpu_can_be_used(complaint: str, torch_says: Callable[[str], None], capsys: Streams) -> None:
    torch_says(complaint)
    err = error_line(COMMANDS[0], capsys)
    assert "--device cuda cannot be used: " in err and STATES[complaint] in err


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_every_command_says_so(
    arguments: tuple[str, ...], torch_says: Callable[[str], None], capsys: Streams
) -> None:
    torch_says(OLD_DRIVER)
    assert f"{arguments[-2]} cuda cannot be used: " in error_line(arguments, capsys)


def test_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch, capsys: Streams) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA; install a CUDA build of torch" in error_line(COMMANDS[0], capsys)


@pytest.mark.parametrize("complaint", STATES)
def test_a_broken_gpu_is_not_passed_over_in_silence(
    complaint: str,
    torch_says: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch_says(complaint)
    with caplog.at_level(logging.WARNING, "lockstep.platforms"):
        assert pick_platform().name != "cuda"
    expected = [] if complaint in (NO_DRIVER, HIDDEN) else [f"cuda is passed over: {cuda_reason()}"]
    assert caplog.messages == expected


def cuda_reason() -> str | None:
    return load_platform("cuda").unavailable_reason()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--attention-backend", "tritn"),
            "unknown attention backend 'tritn'; did you mean 'triton'? (known: ",
        ),
        (("--attention-backend", "nonsense"), "unknown attention backend 'nonsense' (known: "),
        (("--attention-backend", "flashinfer"), "--attention-backend flashinfer cannot be used: made for cuda"),
        (("--force-kernel", "rope=tritn"), "--force-kernel rope=tritn names no kernel; did you mean 'triton'?"),
        (("--device", "cudda"), "unknown device 'cudda'; did you mean 'cuda'? (known: auto, "),
    ],
)
def test_names_that_nobody_has(options: tuple[str, ...], said: str, capsys: Streams) -> None:
    device = () if "--device" in options else ("--device", "cpu")
    assert said in error_line(("run", "Hello", *device, *options), capsys)


def test_weights_that_outgrow_the_device(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    """Others took the memory in the meantime: torch's own text is several lines of advice on its allocator."""

    def load(*where: Any, **how: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.\nSee documentation.")

    monkeypatch.setattr(build, "load_model", load)
    with pytest.raises(
        OutOfMemory, match=r"the weights \([\d.]+ KiB on each device\) do not fit: .* free before"
    ):
        LLM(str(tiny_llama), device="cpu", max_total_tokens=256)
    err = error_line(("run", "Hello", str(tiny_llama), "--device", "cpu"), capsys)
    assert "share the weights out with --tp, or choose a smaller model" in err


def test_a_model_larger_than_the_card(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    platform = type(load_platform("sim"))
    facts = load_platform("sim").memory()
    small = type(facts)(total_bytes=2**18, available_bytes=2**17)
    monkeypatch.setattr(platform, "memory", lambda self, index=0: small)
    err = error_line(("explain", "memory", str(tiny_llama), "--device", "sim"), capsys)
    assert "more than the" in err and "that may be used; " in err
