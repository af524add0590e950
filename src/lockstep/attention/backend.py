"""What an attention backend is. Its contract and reference are the operator paged_attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lockstep.core.errors import ConfigError, nearest
from lockstep.kv.pool.pool import LayerKV
from lockstep.ops.contract import Signature
from lockstep.ops.paged_attention.reference import Span


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """How one layer attends. `window` 0 sees every earlier token; `soft_cap` 0 is none."""

    scale: float
    window: int = 0
    soft_cap: float = 0.0


class AttentionBackend(ABC):
    """Plans a step once on the host, then serves every layer of it."""

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def refuses(cls, signature: Signature) -> str | None:
        """None when the backend serves layers of this signature, else the reason."""

    @abstractmethod
    def plan(
        self, spans: Sequence[Span], *, page_size: int, windows: Sequence[int], device: torch.device
    ) -> Any:
        """Everything about a step that its layers share. Rows of q follow the spans' order."""

    @abstractmethod
    def run(self, plan: Any, q_TNH: torch.Tensor, kv: LayerKV, spec: AttentionSpec) -> torch.Tensor:
        """out [T, N, H] in the dtype of q, for one layer whose new keys and values are already stored."""


def pick_backend(name: str, preference: Sequence[str], signature: Signature) -> tuple[AttentionBackend, str]:
    """The named backend, or with "auto" the first of the platform's preference that accepts; and why.

    Raises ConfigError for an unknown name or a refusal of the named one.
    """
    from lockstep.attention.torch_backend import ReferenceBackend, TorchBackend

    known: dict[str, type[AttentionBackend]] = {kind.name: kind for kind in (TorchBackend, ReferenceBackend)}
    if name != "auto":
        if name not in known:
            raise ConfigError(
                f"unknown attention backend {name!r}{nearest(name, known)} (known: {', '.join(known)})"
            )
        reason = known[name].refuses(signature)
        if reason is not None:
            raise ConfigError(f"--attention-backend {name} cannot be used: {reason}")
        return known[name](), "asked for"
    refused: list[str] = []
    for candidate in (*preference, "reference"):
        reason = known[candidate].refuses(signature)
        if reason is None:
            return known[candidate](), "; ".join(["first that accepts in this platform's preference", *refused])
        refused.append(f"{candidate}: {reason}")
    raise ConfigError(f"no attention backend serves this model: {'; '.join(refused)}")
