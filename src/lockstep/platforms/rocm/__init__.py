"""AMD GPUs through torch's ROCm build, which keeps the names of torch.cuda.

Written from the documentation of ROCm's PyTorch and not yet run on an AMD GPU: streams, bfloat16 and collectives are
what torch says of the device, and whatever a run would have to show (graphs, fp8, fast attention) is not stated.
"""

from __future__ import annotations

from lockstep.core.capabilities import Capabilities
from lockstep.platforms.accelerator import TorchAccelerator, has_package


class RocmPlatform(TorchAccelerator):
    """AMD GPUs of the Instinct and Radeon families that torch's ROCm build serves."""

    name = "rocm"
    device_type = "cuda"
    kernel_preference = ("aiter", "triton", "torch", "reference")
    attention_preference = ("triton", "torch")

    def unavailable_reason(self) -> str | None:
        import torch

        if torch.version.hip is None:
            return "this PyTorch was built without ROCm; install a ROCm build of torch"
        if not torch.cuda.is_available():
            return "no AMD GPU with a working driver was found"
        return None

    def capabilities(self) -> Capabilities:
        import torch

        facts = torch.cuda.get_device_properties(0)
        # Such as "gfx942:sramecc+:xnack-": what follows the colon are modes, not the instruction set.
        architecture = getattr(facts, "gcnArchName", "").partition(":")[0]
        has_triton = has_package("triton")
        features = {architecture} if architecture else set()
        return Capabilities(
            platform=self.name,
            device_type=self.device_type,
            device_name=facts.name,
            num_devices=torch.cuda.device_count(),
            memory_bytes=facts.total_memory,
            fast_dtypes=self._fast_dtypes(),
            features=frozenset(features | ({"triton"} if has_triton else set())),
            has_streams=self._has_streams(),
            has_triton=has_triton,
            # RCCL answers under NCCL's name in torch's ROCm build.
            collective_backend="nccl" if _has_nccl() else None,
        )


def _has_nccl() -> bool:
    from torch import distributed

    return distributed.is_available() and distributed.is_nccl_available()
