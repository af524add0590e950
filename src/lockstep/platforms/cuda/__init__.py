"""NVIDIA GPUs through torch's CUDA build."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING

from lockstep.core.capabilities import Capabilities
from lockstep.platforms.accelerator import CudaGraph, TorchAccelerator, has_package
from lockstep.platforms.base import DeviceGraph

if TYPE_CHECKING:
    import torch


class CudaPlatform(TorchAccelerator):
    """NVIDIA GPUs. bf16 needs compute capability 8.0; older cards run in float16."""

    name = "cuda"
    device_type = "cuda"
    kernel_preference = ("cublas", "cudnn", "flashinfer", "cuda", "triton", "torch", "reference")
    # Measured on one H100 80GB (docs/performance.md). Decoding, all are within a tenth of each other and of the
    # memory's speed where it matters; Triton reads lengths on the device, FlashInfer plans on the host before each
    # step. Extending, FlashInfer's FA3 reaches 470 to 557 TFLOP/s, Triton 357. cuDNN's 455 to 572 do not meet the
    # contract: it multiplies values behind a sequence's keys by zero, so a NaN that was left there shows.
    attention_preference = ("triton", "flashinfer", "cudnn", "torch")
    extend_preference = ("flashinfer", "triton", "torch")

    def unavailable_reason(self) -> str | None:
        import torch

        if torch.version.cuda is None:
            return "this PyTorch was built without CUDA; install a CUDA build of torch"
        said = _torchs_complaint()
        return None if said is None else _reason(said, torch.version.cuda)

    def is_broken(self) -> bool:
        import torch

        said = _torchs_complaint() if torch.version.cuda is not None else None
        return said is not None and not said.startswith((_NO_DRIVER, _NO_GPU))

    def capabilities(self) -> Capabilities:
        import torch

        facts = torch.cuda.get_device_properties(0)
        capability = facts.major * 10 + facts.minor
        has_triton = capability >= 70 and has_package("triton")
        features = {f"sm_{capability}", "fast_bf16_attention"}
        if capability >= 89:
            features.add("fp8")
        if has_triton:
            features.add("triton")
        features.update(package for package in ("cudnn", "flashinfer") if has_package(package))
        if has_package("cuda.bindings"):
            features.add("cuda_bindings")
        return Capabilities(
            platform=self.name,
            device_type=self.device_type,
            device_name=facts.name,
            num_devices=torch.cuda.device_count(),
            memory_bytes=facts.total_memory,
            fast_dtypes=("bfloat16", "float16") if capability >= 80 else ("float16",),
            features=frozenset(features),
            has_graphs=True,
            has_streams=True,
            has_triton=has_triton,
            collective_backend="nccl",
        )

    def device(self, index: int = 0) -> torch.device:
        import torch

        # Contracts sum products in float32; cuBLAS may otherwise add partial sums in the inputs' dtype.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        return super().device(index)

    def new_graph(self, beside: DeviceGraph | None = None) -> DeviceGraph:
        return CudaGraph(beside)


# How torch's complaints begin. Source: PyTorch, c10/cuda/CUDAFunctions.cpp.
_NO_DRIVER = "Found no NVIDIA driver"
_NO_GPU = "No CUDA GPUs are available"
_OLD_DRIVER = r"driver on your system is too old \(found version (\d+)\)"


def _torchs_complaint() -> str | None:
    """What torch says of why it can use no GPU; None when it can."""
    import torch

    with warnings.catch_warnings():
        # It warns of what it raises below, over several lines.
        warnings.simplefilter("ignore")
        if torch.cuda.is_available():
            return None
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            return str(error)
    return _NO_GPU


def _reason(said: str, built_for: str) -> str:
    """One line that says what is wrong and what to do. `built_for`: the version of CUDA that torch was built for."""
    if said.startswith(_NO_DRIVER):
        return "no NVIDIA driver was found: install the one of your GPU, or use another device"
    if said.startswith(_NO_GPU):
        return "the NVIDIA driver shows no GPU: see what `nvidia-smi -L` lists and CUDA_VISIBLE_DEVICES leaves of it"
    old = re.search(_OLD_DRIVER, said)
    if old is not None:
        major, minor = divmod(int(old[1]) // 10, 100)
        return (
            f"the NVIDIA driver serves CUDA up to {major}.{minor}, and this PyTorch was built for {built_for}: "
            f"install a newer driver, or a PyTorch that was built for CUDA {major}.{minor}"
        )
    error = re.search(r"Error \d+: .*", said)
    first = error[0] if error is not None else said.strip().partition("\n")[0]
    return (
        f"CUDA does not start ({first}): see whether `nvidia-smi` works, then restart the machine or its driver"
    )
