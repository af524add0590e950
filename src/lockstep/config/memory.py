"""Where memory would go, before anything is loaded: what the weights leave for the KV pool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.config.facts import ModelFacts

SMALLEST_POOL_TOKENS = 256
"""With fewer KV slots than this not even one small request can be served."""
_SMALLER = {"dtype": ("bfloat16",), "kv_cache_dtype": ("bfloat16",), "quantization": ("q8_0", "q4_0")}
"""Forms that take less of a host's memory, the most exact one first."""


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

    def lacks(self, num_tokens: int) -> bool:
        """True when `num_tokens` KV slots do not fit beside the weights."""
        return self.allowed_bytes is not None and num_tokens > self.pool_tokens

    def shortage(self, num_tokens: int) -> str:
        """By how much `num_tokens` KV slots do not fit, in words."""
        assert self.allowed_bytes is not None
        pool_bytes = num_tokens * self.token_bytes
        needed_bytes = self.weight_bytes + pool_bytes
        return (
            f"weights ({human_bytes(self.weight_bytes)}) and a KV pool of {num_tokens} tokens "
            f"({human_bytes(pool_bytes)}) need {human_bytes(needed_bytes)}, "
            f"{human_bytes(needed_bytes - self.allowed_bytes)} more than the {human_bytes(self.allowed_bytes)} "
            "that may be used"
        )


def remedies(
    model: ModelFacts,
    decided: Mapping[str, Any],
    num_tokens: int,
    *,
    available_bytes: int,
    ranks_share_memory: bool,
    num_devices: int,
) -> list[str]:
    """Single options, each of which lets the weights and a KV pool of `num_tokens` fit, or a smaller pool."""

    def plan(**changes: Any) -> MemoryPlan:
        return MemoryPlan.of(
            model,
            {**decided, **changes},
            available_bytes=available_bytes,
            ranks_share_memory=ranks_share_memory,
        )

    found = []
    fitting = plan().pool_tokens // decided["page_size"] * decided["page_size"]
    if fitting >= SMALLEST_POOL_TOKENS:
        found.append(f"--max-total-tokens {fitting} (a request's --context-length fits up to there)")
    fractions = (percent / 100 for percent in range(int(decided["mem_fraction_static"] * 100) + 1, 98))
    enough = (share for share in fractions if not plan(mem_fraction_static=share).lacks(num_tokens))
    found += [f"--mem-fraction-static {share:g}" for share in list(enough)[:1]]
    for name, values in _SMALLER.items() if ranks_share_memory else ():
        smaller = (
            value for value in values if value != decided[name] and not plan(**{name: value}).lacks(num_tokens)
        )
        found += [f"--{name.replace('_', '-')} {value}" for value in list(smaller)[:1]]
    if not ranks_share_memory:
        ranks = (tp for tp in model.valid_tp() if decided["tp"] < tp <= num_devices)
        found += [f"--tp {tp}" for tp in list(tp for tp in ranks if not plan(tp=tp).lacks(num_tokens))[:1]]
    return found


def human_bytes(count: int) -> str:
    """A size for people, in binary units: 1536 -> "1.5 KiB"."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"
