"""Packs values into ggml's K blocks, which the gguf package can only read.

Layouts: ggml-common.h of https://github.com/ggml-org/ggml. Rounding to the nearest step, with no search for better
scales: the values that count in a test are those that the gguf package reads back.

Shapes: B blocks of 256 values, G groups of a block, E values of a group.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import pytest

Array = np.ndarray


def pack_q4_k(values_BE: Array) -> Array:
    """Two half super-scales, 12 bytes of 6-bit scales and minima, 4 bits each."""
    q_BGE, header = _scaled_with_minimum(values_BE, highest=15)
    return np.concatenate((*header, _nibbles(q_BGE)), axis=1)


def pack_q5_k(values_BE: Array) -> Array:
    """As Q4_K, with 32 bytes before the low bits whose bit g is the fifth bit of group g."""
    q_BGE, header = _scaled_with_minimum(values_BE, highest=31)
    fifth_bits = ((q_BGE >> 4) << np.arange(8, dtype=np.uint8)[:, None]).sum(axis=1, dtype=np.uint8)
    return np.concatenate((*header, fifth_bits, _nibbles(q_BGE & 15)), axis=1)


def pack_q6_k(values_BE: Array) -> Array:
    """Low 4 bits, high 2 bits, 16 int8 group scales, one half super-scale; values are shifted by 32."""
    values_BGE = values_BE.reshape(len(values_BE), 16, 16)
    wanted_BG = np.abs(values_BGE).max(axis=2) / 31
    d_B = _half(wanted_BG.max(axis=1) / 127)
    scale_BG = np.rint(_over(wanted_BG, d_B[:, None])).astype(np.int8)
    step_BG = d_B[:, None] * scale_BG
    q_BE = (np.clip(np.rint(_over(values_BGE, step_BG[:, :, None])), -32, 31) + 32).astype(np.uint8)
    halves = q_BE.reshape(-1, 2, 4, 32)
    low = halves[:, :, :2] & 15 | (halves[:, :, 2:] & 15) << 4
    high = (halves >> 4 << np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]).sum(axis=2, dtype=np.uint8)
    parts = (low, high, scale_BG.view(np.uint8), _half_bytes(d_B))
    return np.concatenate([part.reshape(len(values_BE), -1) for part in parts], axis=1)


PACKERS: dict[str, Callable[[Array], Array]] = {"Q4_K": pack_q4_k, "Q5_K": pack_q5_k, "Q6_K": pack_q6_k}


def teach_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `gguf.quants.quantize` write K blocks for the length of a test."""
    for name, pack in PACKERS.items():
        monkeypatch.setattr(getattr(gguf.quants, name), "quantize_blocks", staticmethod(pack))


def _scaled_with_minimum(values_BE: Array, *, highest: int) -> tuple[Array, tuple[Array, ...]]:
    """Integers of 8 groups where a value is q * d * scale - dmin * minimum; and the bytes before them."""
    values_BGE = values_BE.reshape(len(values_BE), 8, 32)
    below_BG = np.maximum(0, -values_BGE.min(axis=2))
    wanted_BG = (values_BGE.max(axis=2) + below_BG).clip(0) / highest
    d_B, dmin_B = _half(wanted_BG.max(axis=1) / 63), _half(below_BG.max(axis=1) / 63)
    scale_BG = np.rint(_over(wanted_BG, d_B[:, None])).clip(0, 63).astype(np.uint8)
    minimum_BG = np.rint(_over(below_BG, dmin_B[:, None])).clip(0, 63).astype(np.uint8)
    shifted_BGE = values_BGE + (dmin_B[:, None] * minimum_BG)[:, :, None]
    q_BGE = np.rint(_over(shifted_BGE, (d_B[:, None] * scale_BG)[:, :, None])).clip(0, highest).astype(np.uint8)
    first, last = slice(0, 4), slice(4, 8)
    packed = (
        scale_BG[:, first] | scale_BG[:, last] >> 4 << 6,
        minimum_BG[:, first] | minimum_BG[:, last] >> 4 << 6,
        scale_BG[:, last] & 15 | (minimum_BG[:, last] & 15) << 4,
    )
    return q_BGE, (_half_bytes(d_B), _half_bytes(dmin_B), *packed)


def _nibbles(q_BGE: Array) -> Array:
    """Even groups in the low, odd groups in the high halves of bytes."""
    return (q_BGE[:, 0::2] | q_BGE[:, 1::2] << 4).reshape(len(q_BGE), -1)


def _half(values: Array) -> Array:
    return values.astype(np.float16).astype(np.float32)


def _half_bytes(values_B: Array) -> Array:
    return values_B.astype(np.float16)[:, None].view(np.uint8)


def _over(values: Array, steps: Array) -> Array:
    return np.divide(values, steps, out=np.zeros_like(values), where=steps != 0)
