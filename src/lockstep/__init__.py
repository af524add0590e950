"""Lockstep: an inference engine that can show that its answers are right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "Grammar", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from lockstep.core.sampling import Grammar, SamplingParams
    from lockstep.engine.llm import LLM


def __getattr__(name: str) -> Any:
    # Imports stay inert: `import lockstep` must not load torch.
    if name == "LLM":
        from lockstep.engine.llm import LLM

        return LLM
    if name in ("Grammar", "SamplingParams"):
        from lockstep.core import sampling

        return getattr(sampling, name)
    raise AttributeError(f"module 'lockstep' has no attribute {name!r}")


def __dir__() -> list[str]:
    # What is imported lazily must be found by those who look around, such as a prompt that completes names.
    return sorted(__all__)
