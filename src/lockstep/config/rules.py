"""How each "auto" becomes concrete: one pure function per option, named like the option.

A rule sees the facts and what was decided before it (options are decided in the order of their declaration) and
returns the value, who decided it and why. Its docstring is the text of the reference page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.config.facts import DTYPE_BYTES, ModelFacts
from lockstep.config.given import Source
from lockstep.config.memory import SMALLEST_POOL_TOKENS, MemoryPlan
from lockstep.core.capabilities import Capabilities

HOST_CONTEXT_LENGTH = 32_768
HOST_POOL_TOKENS = 65_536


@dataclass(frozen=True, slots=True)
class Situation:
    """What a rule may look at: facts, and the values decided so far.

    `available_bytes` is the memory of one device that this process may still take, 0 when unknown.
    """

    model: ModelFacts
    device: Capabilities
    available_bytes: int
    decided: Mapping[str, Any]

    @property
    def on_accelerator(self) -> bool:
        """True for a device with memory and a queue of its own; false when the host itself computes."""
        return self.device.has_streams

    @property
    def num_ranks(self) -> int:
        return int(self.decided["tp"] * self.decided["ep"] * self.decided["dp"])

    def memory_plan(self) -> MemoryPlan:
        """What weights leave for the KV pool, once everything that it depends on is decided."""
        return MemoryPlan.of(
            self.model,
            self.decided,
            available_bytes=self.available_bytes,
            ranks_share_memory=not self.on_accelerator,
        )

    def by_device(self, *, host: Any, accelerator: Any, unit: str = "") -> Choice:
        """A default that was tuned for each of the two kinds of device."""
        kind = "an accelerator" if self.on_accelerator else "a host processor"
        return Choice(accelerator if self.on_accelerator else host, "device", f"usual for {kind}{unit}")


@dataclass(frozen=True, slots=True)
class Choice:
    """A value with the one who decided it and the reason, a short clause."""

    value: Any
    source: Source
    why: str


def _served_model_name(at: Situation) -> Choice:
    """The model's own name."""
    return Choice(at.model.name, "model", "the model's own name")


def _load_format(at: Situation) -> Choice:
    """`files`."""
    return Choice("files", "default", "")


def _dtype(at: Situation) -> Choice:
    """The stored type where the device computes it at full speed, else the device's fastest type."""
    stored, fast = at.model.stored_dtype, at.device.fast_dtypes
    if at.model.overflows_float16 and "float16" in (stored, fast[0]):
        wider = "bfloat16" if "bfloat16" in fast else "float32"
        return Choice(wider, "model", f"stored as {stored}; its sums are too large for float16")
    if stored in fast:
        return Choice(stored, "model", "as stored, and fast on this device")
    return Choice(fast[0], "device", f"stored as {stored}; {fast[0]} is fastest on this device")


def _quantization(at: Situation) -> Choice:
    """`stored` where the device has kernels that read the file's integers, else `none`."""
    is_plain = at.model.stored_dtype in DTYPE_BYTES
    if at.device.has("native") and not is_plain and at.decided["dtype"] != "float32":
        return Choice("stored", "device", f"native kernels read {at.model.stored_dtype} as it is")
    return Choice("none", "derived", f"weights are expanded to {at.decided['dtype']} while loading")


def _context_length(at: Situation) -> Choice:
    """What the model was trained for; on a host processor at most 32768."""
    trained = at.model.context_length
    if at.on_accelerator or trained <= HOST_CONTEXT_LENGTH:
        return Choice(trained, "model", "what the model was trained for")
    return Choice(HOST_CONTEXT_LENGTH, "device", f"the model allows {trained}; bounded on a host processor")


def _device(at: Situation) -> Choice:
    """The best platform that is present."""
    return Choice(at.device.platform, "device", f"the best platform present: {at.device.device_name}")


def _threads(at: Situation) -> Choice:
    """The threads of the machine, shared among the ranks."""
    threads = max(1, at.device.num_threads // at.num_ranks)
    return Choice(threads, "device", f"{at.device.num_threads} on this machine, {at.num_ranks} rank(s)")


def _kv_cache_dtype(at: Situation) -> Choice:
    """The type of the model; on a host processor without native kernels float32."""
    # Stock attention over bfloat16 keys with one query per sequence takes about four times as long as over
    # float32 on processors that lack the instructions.
    if at.on_accelerator or at.device.has("native"):
        return Choice(at.decided["dtype"], "derived", "as --dtype")
    return Choice("float32", "device", "attention over float32 is fastest on this processor")


def _page_size(at: Situation) -> Choice:
    """16; 32 on a host processor without native kernels, where whole pages are copied together to attend."""
    if at.device.has("native"):
        return Choice(16, "device", "native kernels read pages of any size; short prefixes are shared")
    return at.by_device(host=32, accelerator=16, unit="; short prefixes are shared, reads stay long")


def _mem_fraction_static(at: Situation) -> Choice:
    """0.8 on a host processor, 0.88 on an accelerator."""
    return at.by_device(host=0.8, accelerator=0.88, unit="; the rest is workspace")


def _max_total_tokens(at: Situation) -> Choice:
    """On a host processor what fits in `--mem-fraction-static`, at most the larger of the context length and
    65536; on an accelerator measured after the weights are loaded."""
    if at.on_accelerator:
        return Choice(None, "device", "measured once the weights are loaded")
    bound = max(at.decided["context_length"], HOST_POOL_TOKENS)
    plan = at.memory_plan()
    if plan.allowed_bytes is None or plan.pool_tokens >= bound:
        return Choice(_whole_pages(bound, at), "derived", "enough for many requests; the rest is left free")
    # A pool below the smallest is refused later, with a text that says what is missing.
    return Choice(_whole_pages(max(plan.pool_tokens, SMALLEST_POOL_TOKENS), at), "device", plan.summary)


def _max_running_requests(at: Situation) -> Choice:
    """64 on a host processor, 256 on an accelerator."""
    return at.by_device(host=64, accelerator=256)


def _chunked_prefill_size(at: Situation) -> Choice:
    """512 on a host processor, 8192 on an accelerator."""
    return at.by_device(host=512, accelerator=8192)


def _overlap(at: Situation) -> Choice:
    """`on` where the device computes while the host goes on, else `off`."""
    if at.on_accelerator:
        return Choice("on", "device", "the host plans the next step while the device computes")
    return Choice("off", "device", "this device computes while the host waits, so there is nothing to hide")


def _attention_backend(at: Situation) -> Choice:
    """The first of the platform's preferences that can serve the model; `lockstep ops explain` names it."""
    return Choice(None, "device", "the platform's first that can serve the model")


def _graphs(at: Situation) -> Choice:
    """`full` for one rank on a device that has graphs, else `off`."""
    return _no_graphs(at) or Choice("full", "device", "decoding is launched as a whole")


def _extend_graphs(at: Situation) -> Choice:
    """`piecewise` for one rank on a device that has graphs, else `off`."""
    return _no_graphs(at) or Choice("piecewise", "device", "all but attention is launched layer by layer")


def _no_graphs(at: Situation) -> Choice | None:
    if not at.device.has_graphs:
        return Choice("off", "device", "this device has no graphs")
    if at.decided["tp"] * at.decided["ep"] > 1:
        return Choice("off", "derived", "sums over ranks were not tried in graphs yet")
    return None


def _pool_in_whole_pages(asked: Choice, at: Situation) -> Choice:
    page_size: int = at.decided["page_size"]
    if asked.value < page_size or asked.value % page_size == 0:
        return asked
    why = f"{asked.why} {asked.value}, down to whole pages of {page_size}".strip()
    return Choice(_whole_pages(asked.value, at), asked.source, why)


def _whole_pages(num_tokens: int, at: Situation) -> int:
    page_size: int = at.decided["page_size"]
    return max(1, num_tokens // page_size) * page_size


RULES: dict[str, Callable[[Situation], Choice]] = {
    rule.__name__.removeprefix("_"): rule
    for rule in (
        _served_model_name,
        _load_format,
        _dtype,
        _quantization,
        _context_length,
        _device,
        _threads,
        _kv_cache_dtype,
        _page_size,
        _mem_fraction_static,
        _max_total_tokens,
        _max_running_requests,
        _chunked_prefill_size,
        _overlap,
        _attention_backend,
        _graphs,
        _extend_graphs,
    )
}

ADJUSTMENTS: dict[str, Callable[[Choice, Situation], Choice]] = {"max_total_tokens": _pool_in_whole_pages}
"""What becomes of a value that was asked for, where not every value can be had exactly."""
