"""Options: declared once, gathered from the user, resolved once, then frozen.

Owns: one dataclass per component, the resolver with its provenance, the environment, the reference page.
Must not know: torch, nor what a value does. Read first: `components.py`, then `resolve.py`.
"""

from lockstep.config.components import (
    CacheOptions,
    DeviceOptions,
    EngineConfig,
    KernelOptions,
    ModelOptions,
    ParallelOptions,
    SchedulerOptions,
    ServerOptions,
)
from lockstep.config.facts import ModelFacts
from lockstep.config.given import Given, gather, wanted
from lockstep.config.resolve import Decision, Resolution, resolve, resolve_server

__all__ = [
    "CacheOptions",
    "Decision",
    "DeviceOptions",
    "EngineConfig",
    "Given",
    "KernelOptions",
    "ModelFacts",
    "ModelOptions",
    "ParallelOptions",
    "Resolution",
    "SchedulerOptions",
    "ServerOptions",
    "gather",
    "resolve",
    "resolve_server",
    "wanted",
]
