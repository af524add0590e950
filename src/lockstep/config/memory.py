"""Where memory would go, before anything is loaded: what the weights leave for the KV pool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.config.facts import ModelFacts
from lockstep.core.errors import OutOfMemory

SMALLEST_POOL_TOKENS = 256
"""With fewer KV slots than this not even one small request can be served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Memory of one replica, an estimate. On a host its ranks share the machine's memory, so all are counted;
    on an accelerator each has a device, so one is.

    `allowed_bytes` is None when the device does not tell how much memory it has.
    """

    allowed_bytes: int | None
    fraction: float
    weight_bytes: int
    token_bytes: int

    @classmethod
    def of(
        cls, model: ModelFacts, decided: Mapping[str, Any], *, available_bytes: int, ranks_share_memory: bool
    ) -> MemoryPlan:
        """`available_bytes` is the free memory of one device, 0 when unknown.

        Needs the decided dtype, quantization, kv_cache_dtype, tp, ep, dp and mem_fraction_static. Ranks that share
        experts out (ep) hold copies of everything else.
        """
        tp, ep, fraction = decided["tp"], decided["ep"], decided["mem_fraction_static"]
        replicas_on_device, ranks_on_device = (decided["dp"], tp * ep) if ranks_share_memory else (1, 1)
        held = model.held_weight_bytes(decided["dtype"], decided["quantization"], copies=ep)
        allowed = int(available_bytes * fraction) // replicas_on_device
        return cls(
            allowed_bytes=allowed if available_bytes else None,
            fraction=fraction,
            weight_bytes=held * ranks_on_device // (tp * ep),
            token_bytes=model.kv_bytes_per_token(decided["kv_cache_dtype"], tp) * ranks_on_device,
        )

    @property
    def pool_tokens(self) -> int:
        """KV slots that fit beside the weights; 0 when the weights already take everything."""
        return max(0, (self.allowed_bytes or 0) - self.weight_bytes) // self.token_bytes

    @property
    def summary(self) -> str:
        allowed = human_bytes(self.allowed_bytes or 0)
        return f"fits in {allowed} beside {human_bytes(self.weight_bytes)} of weights"

    def require(self, num_tokens: int) -> None:
        """Raises OutOfMemory, saying what is missing and what to change, unless `num_tokens` KV slots fit."""
        if self.allowed_bytes is None or num_tokens <= self.pool_tokens:
            return
        pool_bytes = num_tokens * self.token_bytes
        raise OutOfMemory(
            f"weights ({human_bytes(self.weight_bytes)}) and a KV pool of {num_tokens} tokens "
            f"({human_bytes(pool_bytes)}) need {human_bytes(self.weight_bytes + pool_bytes)}, but "
            f"{human_bytes(self.allowed_bytes)} may be used; lower --max-total-tokens or --context-length, "
            f"raise --mem-fraction-static (now {self.fraction:g}), or choose a smaller --dtype or model"
        )


def human_bytes(count: int) -> str:
    """A size for people, in binary units: 1536 -> "1.5 KiB"."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"
