"""Floating-point values to ggml's blocks of integers, exactly as ggml's own tools round them.

Source: quantize_row_q4_0_ref and quantize_row_q8_0_ref in ggml-quants.c of https://github.com/ggml-org/ggml.

Shape suffixes: R rows, C columns, N blocks, E the 32 elements of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lockstep.core.errors import ConfigError, ModelFileError, nearest
from lockstep.quantization.ggml_blocks import Groups

BLOCK = 32
"""Neighbours that share a scale."""

# Elements at a time: the temporaries of one piece, in float64, stay in a core's cache.
_PIECE_ELEMENTS = 1 << 16


def quantise(values_RC: torch.Tensor, name: str) -> Groups:
    """Values as `name` ("q4_0" or "q8_0") would store them: int8 q [R, C], scale [R, C / 32] as float32 that half
    precision holds exactly, and no minimum; value = q * scale.

    Raises ConfigError for another name, ModelFileError where rows are not whole blocks or where values are not finite
    or too large for a scale in half precision.
    """
    rounding = _ROUNDINGS.get(name)
    if rounding is None:
        known = ", ".join(_ROUNDINGS)
        raise ConfigError(f"values can be quantised to {known}, not to {name!r}{nearest(name, _ROUNDINGS)}")
    num_rows, num_columns = values_RC.shape
    if num_columns % BLOCK:
        raise ModelFileError(f"{num_columns} columns are not whole {name} blocks of {BLOCK}")
    values_NE = values_RC.reshape(-1, BLOCK)
    q_NE = torch.empty(values_NE.shape, dtype=torch.int8, device=values_RC.device)
    scale_N = torch.empty(values_NE.shape[0], dtype=torch.float32, device=values_RC.device)
    num_blocks = _PIECE_ELEMENTS // BLOCK
    for values, q, scale in zip(
        values_NE.split(num_blocks), q_NE.split(num_blocks), scale_N.split(num_blocks), strict=True
    ):
        exact_q, exact_scale = rounding(values.float())
        q.copy_(exact_q)
        scale.copy_(exact_scale.half())
    if not scale_N.isfinite().all():
        raise ModelFileError(f"values that are not finite, or too large for {name}, cannot be quantised")
    return Groups(q_NE.view(num_rows, num_columns), scale_N.view(num_rows, -1), None)


def _q4_0(values_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-8 to 7. The largest magnitude becomes -8, the end that reaches further, whatever its sign."""
    at_N = values_NE.abs().argmax(dim=1, keepdim=True)
    scale_N = values_NE.gather(1, at_N)[:, 0] / -8
    # Adds before it cuts off the fraction, in one rounding: hence float64 here, where ggml has a fused operation.
    shifted_NE = values_NE.double() * _inverse(scale_N).double()[:, None] + 8.5
    return shifted_NE.trunc().clamp_(0, 15) - 8, scale_N


def _q8_0(values_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-127 to 127, halves away from zero."""
    scale_N = values_NE.abs().amax(dim=1) / 127
    scaled_NE = (values_NE * _inverse(scale_N)[:, None]).double()
    return (scaled_NE.abs() + 0.5).floor_().copysign_(scaled_NE), scale_N


def _inverse(scale_N: torch.Tensor) -> torch.Tensor:
    """1 / scale, of the scale before it is rounded to half precision; 0 for blocks of zeros."""
    return torch.where(scale_N == 0, 0.0, 1 / scale_N)


_ROUNDINGS: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "q4_0": _q4_0,
    "q8_0": _q8_0,
}
