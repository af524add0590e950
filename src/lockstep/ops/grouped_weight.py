"""A constant weight as small integers with scales: what block formats hold, whatever file it came from.

Shapes: O outputs, I inputs, G groups of neighbouring inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """value = scale * (q - zero), plus the group's minimum where there is one.

    q_OI is uint8, below 2^bits (bits is 4 or 8). scale_OG and minimum_OG are float32, one entry for I / G
    neighbouring inputs (16 or 32 of them). `zero` is 0 where there are minima.
    """

    q_OI: torch.Tensor
    scale_OG: torch.Tensor
    minimum_OG: torch.Tensor | None
    zero: int
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.q_OI.shape[0], self.q_OI.shape[1]

    @property
    def is_meta(self) -> bool:
        """True for a shape without values."""
        return self.q_OI.is_meta

    @property
    def group_inputs(self) -> int:
        """Neighbouring inputs that share a scale."""
        return self.q_OI.shape[1] // self.scale_OG.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the integers at their width and of 16-bit scales and minima."""
        scales = self.scale_OG.numel() * (1 if self.minimum_OG is None else 2)
        return self.q_OI.numel() * self.bits // 8 + 2 * scales

    def kind(self) -> tuple[int, int, int, bool]:
        """Weights of one kind can be laid one after the other."""
        return self.bits, self.zero, self.group_inputs, self.minimum_OG is not None

    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values [O, I], computed in float32 (float64 when asked for) and rounded once."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        q_OGE = self.q_OI.unflatten(1, (-1, self.group_inputs)).to(exact) - self.zero
        values_OGE = q_OGE * self.scale_OG.to(exact).unsqueeze(-1)
        if self.minimum_OG is not None:
            values_OGE += self.minimum_OG.to(exact).unsqueeze(-1)
        return values_OGE.flatten(1).to(dtype)

    @staticmethod
    def concatenated(weights: Sequence[GroupedWeight]) -> GroupedWeight:
        """Outputs of several weights of one kind, one after the other."""
        first = weights[0]
        minima = [weight.minimum_OG for weight in weights if weight.minimum_OG is not None]
        return GroupedWeight(
            torch.cat([weight.q_OI for weight in weights]),
            torch.cat([weight.scale_OG for weight in weights]),
            torch.cat(minima) if minima else None,
            first.zero,
            first.bits,
        )
