"""NVIDIA GPUs through torch's CUDA build."""

from __future__ import annotations

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
    kernel_preference = ("cublas", "cudnn", "flashinfer", "triton", "torch", "reference")
    # Measured on one H100 80GB (docs/performance.md). Decoding, all are within a tenth of each other and of the
    # memory's speed where it matters; Triton reads lengths on the device, FlashInfer plans on the host before each
    # step. Extending, FlashInfer's FA3 reaches 470 to 557 TFLOP/s and cuDNN 455 to 572, Triton 357.
    attention_preference = ("triton", "flashinfer", "cudnn", "torch")
    extend_preference = ("flashinfer", "cudnn", "triton", "torch")

    def unavailable_reason(self) -> str | None:
        import torch

        if torch.version.cuda is None:
            return "this PyTorch was built without CUDA; install a CUDA build of torch"
        if not torch.cuda.is_available():
            return "no NVIDIA GPU with a working driver was found"
        return None

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
