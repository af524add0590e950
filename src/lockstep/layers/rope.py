"""Rotary embeddings: which angles a model uses, and the rotation.

Shapes: T tokens, N heads, H head dim, R2 half of the rotated dims.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lockstep.core.errors import ModelFileError, nearest
from lockstep.layers.build import Build

_NEEDED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (),
}
"""Kinds, and the parameters without which they mean nothing."""


@dataclass(frozen=True)
class RopeSpec:
    """Angles of a model. `scaling` holds the kind's own parameters under their Hugging Face names.

    Kinds: "default"; "linear" (positions divided by factor); "llama3" (low frequencies divided, Llama 3.1);
    "yarn" (Peng et al., 2023: a ramp between both, and scaled vectors).
    """

    theta: float
    rotated_dim: int
    max_positions: int
    kind: str = "default"
    scaling: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, parameters: Mapping[str, Any], *, rotated_dim: int, max_positions: int) -> RopeSpec:
        """From a Hugging Face `rope_parameters` or `rope_scaling` mapping that includes rope_theta.

        Raises ModelFileError for a kind that is not known, or that lacks a parameter.
        """
        kind = parameters.get("rope_type") or parameters.get("type") or "default"
        if kind not in _NEEDED:
            raise ModelFileError(
                f"unknown rope type {kind!r}{nearest(kind, _NEEDED)} (known: {', '.join(_NEEDED)})"
            )
        missing = [name for name in _NEEDED[kind] if not isinstance(parameters.get(name), (int, float))]
        if missing:
            raise ModelFileError(f"rope type {kind!r} needs a number as its {missing[0]!r}")
        rest = tuple(
            sorted((k, v) for k, v in parameters.items() if k not in ("rope_type", "type", "rope_theta"))
        )
        return cls(float(parameters["rope_theta"]), rotated_dim, max_positions, kind, rest)

    def frequencies(self) -> tuple[torch.Tensor, float]:
        """Angle per position of each pair, float32 [R2], and the factor on cos and sin."""
        options = dict(self.scaling)
        exponents = torch.arange(0, self.rotated_dim, 2, dtype=torch.float32) / self.rotated_dim
        base = 1.0 / self.theta**exponents
        if self.kind == "linear":
            return base / float(options["factor"]), 1.0
        if self.kind == "llama3":
            return _llama3(base, options), 1.0
        if self.kind == "yarn":
            return self._yarn(base, options)
        return base, 1.0

    def _yarn(self, base: torch.Tensor, options: Mapping[str, Any]) -> tuple[torch.Tensor, float]:
        trained = int(options.get("original_max_position_embeddings") or self.max_positions)
        factor = float(options.get("factor") or self.max_positions / trained)

        def pair_turning(num_turns: float) -> float:
            """The pair that makes this many turns over the trained length."""
            return self.rotated_dim * math.log(trained / (num_turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low = pair_turning(float(options.get("beta_fast") or 32))
        high = pair_turning(float(options.get("beta_slow") or 1))
        if options.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotated_dim - 1)
        span = (high - low) or 0.001
        ramp = ((torch.arange(self.rotated_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
        mixed = base / factor * ramp + base * (1 - ramp)
        return mixed, _yarn_attention_factor(factor, options)


def _yarn_attention_factor(factor: float, options: Mapping[str, Any]) -> float:
    def log_scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given = options.get("attention_factor")
    if given is not None:
        return float(given)
    mscale, all_dim = options.get("mscale"), options.get("mscale_all_dim")
    if mscale and all_dim:
        return log_scale(float(mscale)) / log_scale(float(all_dim))
    return log_scale(1.0)


def _llama3(base: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
    """Long wavelengths divided by factor, short ones kept, a linear blend between."""
    factor = float(options["factor"])
    low, high = float(options["low_freq_factor"]), float(options["high_freq_factor"])
    trained = float(options["original_max_position_embeddings"])
    turns = trained * base / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return base * keep + base / factor * (1 - keep)


class RotaryEmbedding:
    """Tables of cos and sin for every position of the context, shared by the layers of a model.

    `table` has both, float32 [2, P, R2].
    """

    def __init__(self, build: Build, spec: RopeSpec) -> None:
        frequencies_R2, factor = spec.frequencies()
        angles = torch.outer(torch.arange(build.context_length, dtype=torch.float32), frequencies_R2)
        self.table = (torch.stack((angles.cos(), angles.sin())) * factor).to(build.device)

    def outline(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of every position, for a kernel of a whole decoder."""
        cos, sin = self.table.unbind()
        return cos, sin

    def at(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, R2], float32, of each row's position."""
        cos, sin = self.outline()
        return cos.index_select(0, positions_T), sin.index_select(0, positions_T)
