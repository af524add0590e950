"""NVIDIA GPUs through torch's CUDA build."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockstep.core.capabilities import Capabilities
from lockstep.platforms.base import MemoryFacts, Platform

if TYPE_CHECKING:
    import torch


class CudaPlatform(Platform):
    """NVIDIA GPUs. bf16 needs compute capability 8.0; older cards run in float16."""

    name = "cuda"
    device_type = "cuda"
    kernel_preference = ("torch", "reference")
    attention_preference = ("torch",)

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
        features = {f"sm_{capability}"}
        if capability >= 89:
            features.add("fp8")
        features.add("fast_bf16_attention")
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
            has_triton=capability >= 70,
            collective_backend="nccl",
            num_threads=1,
        )

    def memory(self, index: int = 0) -> MemoryFacts:
        import torch

        free, total = torch.cuda.mem_get_info(index)
        return MemoryFacts(total, free)

    def device(self, index: int = 0) -> torch.device:
        import torch

        return torch.device("cuda", index)

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()
