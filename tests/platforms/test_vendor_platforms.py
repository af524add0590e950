"""ROCm and MUSA without their hardware: their records from made-up devices, their kernels over made-up libraries.

This proves the plumbing (which function is called with what) and nothing about the hardware.
"""

from __future__ import annotations

import importlib.machinery
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from lockstep.core.capabilities import Capabilities
from lockstep.core.errors import KernelError
from lockstep.ops.check import check_kernel
from lockstep.ops.contract import Kernel
from lockstep.ops.registry import contracts, kernels
from lockstep.ops.selection import KernelSelector
from lockstep.platforms.registry import load_platform

pytestmark = pytest.mark.suite("cpu")

VENDORS = {"aiter": "rocm", "musa": "musa"}


def vendor_kernels(provider: str) -> list[Kernel]:
    found = [kernel for op in contracts() for kernel in kernels(op) if kernel.provider == provider]
    assert found
    return found


@pytest.mark.parametrize(("provider", "platform"), VENDORS.items())
def test_vendor_kernels_claim_no_hardware_and_run_on_one_platform(provider: str, platform: str) -> None:
    for kernel in vendor_kernels(provider):
        assert kernel.platforms == {platform}
        assert kernel.verified_on == ()


@pytest.mark.parametrize(
    ("platform", "provider", "missing"),
    [
        ("rocm", "aiter", "the package aiter is not installed"),
        ("musa", "musa", "the package torch_musa brings it"),
    ],
)
def test_a_kernel_asked_for_by_name_says_what_is_missing(platform: str, provider: str, missing: str) -> None:
    stated = Capabilities(platform=platform, device_type="cuda", device_name="none")
    preference = load_platform(platform).kernel_preference
    selector = KernelSelector(stated, preference, forced={"silu_and_mul": provider})
    signature = {"dtype": torch.bfloat16, "width": 96}
    with pytest.raises(KernelError, match=f"silu_and_mul={provider} cannot serve mlp: .*{missing}"):
        selector.bind("silu_and_mul", "mlp", signature)
    free = KernelSelector(stated, preference).bind("silu_and_mul", "mlp", signature)
    assert free.kernel.provider in ("triton", "torch") and free.refused[0][0] == provider


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()).to(x.dtype)


def made_up_aiter() -> ModuleType:
    """aiter's three functions, with its order of arguments, in float64."""

    def silu_and_mul(out: torch.Tensor, x: torch.Tensor) -> None:
        gate, up = x.double().chunk(2, -1)
        out.copy_(gate / (1 + (-gate).exp()) * up)

    def rmsnorm2d_fwd_with_add(
        out: torch.Tensor,
        x: torch.Tensor,
        residual_in: torch.Tensor,
        residual_out: torch.Tensor,
        weight: torch.Tensor,
        epsilon: float,
    ) -> None:
        residual_out.copy_(x + residual_in)
        out.copy_(rms(residual_out, weight, epsilon))

    module = ModuleType("aiter")
    module.__spec__ = importlib.machinery.ModuleSpec("aiter", None)
    vars(module).update(silu_and_mul=silu_and_mul, rms_norm=rms, rmsnorm2d_fwd_with_add=rmsnorm2d_fwd_with_add)
    return module


class SwishGLU(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.double().chunk(2, -1)
        return (gate / (1 + (-gate).exp()) * up).to(x.dtype)


@pytest.mark.parametrize("provider", VENDORS)
def test_vendor_kernels_call_their_library_as_it_wants(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiter", made_up_aiter())
    monkeypatch.setattr(torch.nn, "SwishGLU", SwishGLU, raising=False)
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    for kernel in vendor_kernels(provider):
        report = check_kernel(contracts()[kernel.op], kernel, seed=seed)
        assert report.passed, report.failures


def test_rocm_states_what_the_device_says(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="Instinct", gcnArchName="gfx942:sramecc+:xnack-", total_memory=192 << 30)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: object())
    platform = load_platform("rocm")
    assert platform.unavailable_reason() is None
    stated = platform.capabilities()
    assert stated.has("gfx942") and (stated.num_devices, stated.memory_bytes) == (8, 192 << 30)
    # Nobody has seen these work there.
    assert not stated.has_graphs and not stated.has("fp8") and not stated.has("fast_bf16_attention")


@pytest.mark.parametrize("says", [True, False])
def test_rocm_repeats_what_torch_says_of_streams_bfloat16_and_collectives(
    says: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(name="Instinct", gcnArchName="gfx942", total_memory=192 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: object() if says else None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: says)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: says)
    stated = load_platform("rocm").capabilities()
    assert stated.has_streams == says and ("bfloat16" in stated.fast_dtypes) == says
    assert stated.collective_backend == ("nccl" if says else None)


def test_graphs_of_cuda_are_captured_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each into memory of its own or of its neighbour, on one stream for all, and ended when recording fails."""
    calls: list[Any] = []

    class Recorded:
        def pool(self) -> str:
            return "its pool"

        def capture_begin(self, **where: Any) -> None:
            calls.append(("begin", where))

        def capture_end(self) -> None:
            calls.append("end")

        def replay(self) -> None:
            calls.append("replay")

    @contextmanager
    def on(stream: object) -> Iterator[None]:
        streams.append(stream)
        yield

    streams: list[object] = []
    for name, double in {
        "CUDAGraph": Recorded,
        "synchronize": lambda: calls.append("synchronize"),
        "current_device": lambda: 0,
        "Stream": lambda index: object(),
        "stream": on,
    }.items():
        monkeypatch.setattr(torch.cuda, name, double)
    platform = load_platform("cuda")
    first = platform.new_graph()
    with first.capture():
        calls.append("work")
    second = platform.new_graph(first)
    with pytest.raises(ZeroDivisionError), second.capture():
        raise ZeroDivisionError
    first.replay()
    alone, beside = ("begin", {}), ("begin", {"pool": "its pool"})
    assert calls == ["synchronize", alone, "work", "end", "synchronize", beside, "end", "replay"]
    assert len(streams) == 2 and len(set(streams)) == 1


def test_musa_states_what_the_extension_says(monkeypatch: pytest.MonkeyPatch) -> None:
    extension = ModuleType("torch_musa")
    extension.__spec__ = importlib.machinery.ModuleSpec("torch_musa", None)
    card = SimpleNamespace(name="MTT", total_memory=80 << 30)
    musa = SimpleNamespace(
        is_available=lambda: True,
        get_device_properties=lambda index: card,
        device_count=lambda: 2,
        mem_get_info=lambda index: (1, 2),
        memory_reserved=lambda index: 0,
    )
    monkeypatch.setitem(sys.modules, "torch_musa", extension)
    monkeypatch.setattr(torch, "musa", musa, raising=False)
    platform = load_platform("musa")
    assert platform.unavailable_reason() is None
    stated = platform.capabilities()
    assert (stated.device_name, stated.num_devices) == ("MTT", 2)
    assert not stated.has_graphs and platform.memory().available_bytes == 1
    # The module says nothing of these, so neither does the platform.
    assert not stated.has_streams and stated.fast_dtypes == ("float32",) and stated.collective_backend is None
    musa.current_stream, musa.is_bf16_supported = (lambda index: object()), (lambda: True)
    stated = platform.capabilities()
    assert stated.has_streams and stated.fast_dtypes == ("bfloat16", "float32")
