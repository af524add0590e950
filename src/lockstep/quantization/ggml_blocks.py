"""ggml's block formats taken apart into integers, scales and minima.

Layouts: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml. In every format a value is
q * scale + minimum, where scale and minimum belong to a group of neighbours within the block.

Shape suffixes: N blocks, B bytes, E elements of a block, G groups of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Groups(NamedTuple):
    """Blocks taken apart: value = q * scale + minimum, group by group.

    `q` is int8 or uint8 with a row's elements in order. `scale` and `minimum` are float32 with one entry for
    each group of that row; `minimum` is None where the format has none.
    """

    q: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None


def q8_0(raw_NB: torch.Tensor) -> Groups:
    """32 elements: half scale, int8 each."""
    return Groups(raw_NB[:, 2:].view(torch.int8), _half(raw_NB, 0), None)


def q4_0(raw_NB: torch.Tensor) -> Groups:
    """32 elements: half scale, 4 bits each, shifted by 8."""
    q_NE = _nibbles(raw_NB[:, 2:], 16).view(torch.int8) - 8
    return Groups(q_NE, _half(raw_NB, 0), None)


def q4_1(raw_NB: torch.Tensor) -> Groups:
    """32 elements: half scale, half minimum, 4 bits each."""
    return Groups(_nibbles(raw_NB[:, 4:], 16), _half(raw_NB, 0), _half(raw_NB, 2))


def q5_0(raw_NB: torch.Tensor) -> Groups:
    """32 elements: half scale, 32 high bits, 4 low bits each, shifted by 16."""
    q_NE = _nibbles(raw_NB[:, 6:], 16) | _bit_of_each(raw_NB[:, 2:6])
    return Groups(q_NE.view(torch.int8) - 16, _half(raw_NB, 0), None)


def q5_1(raw_NB: torch.Tensor) -> Groups:
    """32 elements: half scale, half minimum, 32 high bits, 4 low bits each."""
    q_NE = _nibbles(raw_NB[:, 8:], 16) | _bit_of_each(raw_NB[:, 4:8])
    return Groups(q_NE, _half(raw_NB, 0), _half(raw_NB, 2))


def q4_k(raw_NB: torch.Tensor) -> Groups:
    """256 elements in 8 groups: 2 half super-scales, 12 bytes of 6-bit scales and minima, 4 bits each."""
    scale_NG, minimum_NG = _super_scales(raw_NB)
    return Groups(_nibbles(raw_NB[:, 16:], 32), scale_NG, minimum_NG)


def q5_k(raw_NB: torch.Tensor) -> Groups:
    """256 elements in 8 groups: as Q4_K, with 32 bytes whose bit g is the fifth bit of group g."""
    scale_NG, minimum_NG = _super_scales(raw_NB)
    high_NGE = (raw_NB[:, None, 16:48] >> _shifts(raw_NB, 8)[:, None]) & 1
    q_NE = _nibbles(raw_NB[:, 48:], 32) | (high_NGE << 4).reshape(-1, 256)
    return Groups(q_NE, scale_NG, minimum_NG)


def q6_k(raw_NB: torch.Tensor) -> Groups:
    """256 elements in 16 groups: 4 low and 2 high bits, int8 group scales, half super-scale, shifted by 32."""
    low_NE = _nibbles(raw_NB[:, :128], 64)
    high_NE = (raw_NB[:, 128:192].reshape(-1, 2, 1, 32) >> _shifts(raw_NB, 8, 2)[:, None]) & 3
    q_NE = (low_NE | (high_NE << 4).reshape(-1, 256)).view(torch.int8) - 32
    scale_NG = _half(raw_NB, 208) * raw_NB[:, 192:208].view(torch.int8).float()
    return Groups(q_NE, scale_NG, None)


def _half(raw_NB: torch.Tensor, at: int) -> torch.Tensor:
    """The half-precision number at a byte of each block, as float32 [N, 1]."""
    return raw_NB[:, at : at + 2].contiguous().view(torch.float16).float()


def _shifts(like: torch.Tensor, stop: int, step: int = 1) -> torch.Tensor:
    return torch.arange(0, stop, step, dtype=torch.uint8, device=like.device)


def _nibbles(packed_NB: torch.Tensor, stride: int) -> torch.Tensor:
    """Each run of `stride` bytes holds as many elements in its low nibbles, the next in its high nibbles."""
    runs = packed_NB.reshape(packed_NB.shape[0], -1, 1, stride)
    return torch.cat((runs & 15, runs >> 4), dim=2).reshape(packed_NB.shape[0], -1)


def _bit_of_each(bits_NB: torch.Tensor) -> torch.Tensor:
    """One bit per element, lowest bit of the first byte first, moved to the place of bit 4."""
    return (((bits_NB[:, :, None] >> _shifts(bits_NB, 8)) & 1) << 4).reshape(bits_NB.shape[0], -1)


def _super_scales(raw_NB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum of 8 groups, 6 bits each.

    Groups 0-3 have a byte of their own; the 2 high bits of groups 4-7 sit on top of those bytes, their 4 low
    bits share the last four.
    """
    first, second, shared = raw_NB[:, 4:8], raw_NB[:, 8:12], raw_NB[:, 12:16]
    scale_NG = torch.cat((first & 63, (shared & 15) | ((first >> 6) << 4)), dim=1)
    minimum_NG = torch.cat((second & 63, (shared >> 4) | ((second >> 6) << 4)), dim=1)
    return _half(raw_NB, 0) * scale_NG.float(), -(_half(raw_NB, 2) * minimum_NG.float())
