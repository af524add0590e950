"""Known-wrong versions of attention over pages. Each takes the arguments of attention_extend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lockstep.ops.attention_extend.reference import (
    attend,
    attention_extend,
    hidden_keys,
    scores,
    softmax_with_sinks,
)

_right: Callable[..., None] = attention_extend


def _wrong_scale(*given: Any) -> None:
    _right(*given[:8], given[8] * 1.1, *given[9:])


def _one_key_too_many(*given: Any) -> None:
    _right(*given[:9], given[9] and given[9] + 1, given[10])


def _sinks_ignored(*given: Any) -> None:
    _right(*given[:6], None, *given[7:])


def _cap_ignored(*given: Any) -> None:
    _right(*given[:10], 0.0)


def _last_key_missing(*given: Any) -> None:
    _right(*given[:5], (given[5] - 1).clamp(min=0), *given[6:])


def _pages_reversed(*given: Any) -> None:
    table, num_keys, page_size = given[3].clone(), given[5].tolist(), given[1].shape[2]
    for row, length in zip(table, num_keys, strict=True):
        used = -(-length // page_size)
        row[:used] = row[:used].flip(0)
    _right(*given[:3], table, *given[4:])


def _other_kv_head(*given: Any) -> None:
    """Query head n reads KV head n % K."""
    q, k, v = given[:3]
    heads = torch.arange(q.shape[1], device=q.device) % k.shape[0]
    _right(q, k[heads], v[heads], *given[3:])


def _padding_left(*given: Any) -> None:
    """Rows that belong to no key stay as they were."""
    cu_rows, num_keys, out = given[4].tolist(), given[5].tolist(), given[7]
    before = out.clone()
    _right(*given)
    out[cu_rows[-1] :] = before[cu_rows[-1] :]
    for index, length in enumerate(num_keys):
        if length == 0:
            out[cu_rows[index] : cu_rows[index + 1]] = before[cu_rows[index] : cu_rows[index + 1]]


def _each_sequence(wrong_attend: Callable[..., torch.Tensor]) -> Callable[..., None]:
    """From a function of q, all slots of a sequence's pages, its number of keys, sinks, scale, window and soft cap."""

    def wrong(*given: Any) -> None:
        q, k, v, table, cu_rows, num_keys, sinks, out, *how = given
        _right(*given)
        bounds = cu_rows.tolist()
        for index, length in enumerate(num_keys.tolist()):
            rows = slice(bounds[index], bounds[index + 1])
            if length == 0:
                continue
            pages = table[index, : -(-length // k.shape[2])].long()
            k_KLH, v_KLH = (pool[:, pages].flatten(1, 2) for pool in (k, v))
            out[rows] = wrong_attend(q[rows], k_KLH, v_KLH, length, sinks, *how).to(out.dtype)

    return wrong


def _weighed(weights_KGTL: torch.Tensor, v_KLH: torch.Tensor) -> torch.Tensor:
    return (weights_KGTL @ v_KLH[:, None].float()).flatten(0, 1).transpose(0, 1)


def _mask_after_softmax(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    length: int,
    sinks: Any,
    scale: float,
    window: int,
    cap: float,
) -> torch.Tensor:
    """Hidden keys, and slots after the last key, take their share of the softmax, then lose their values."""
    weights = softmax_with_sinks(scores(q, k, scale, cap), sinks)[..., :length]
    weights = weights.masked_fill(hidden_keys(len(q), length, window, q.device), 0)
    return _weighed(weights, v[:, :length])


def _scores_in_16_bits(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    length: int,
    sinks: Any,
    scale: float,
    window: int,
    cap: float,
) -> torch.Tensor:
    rounded = scores(q, k[:, :length], scale, cap).to(_sixteen_bits(q.dtype)).float()
    hidden = hidden_keys(len(q), length, window, q.device)
    return _weighed(softmax_with_sinks(rounded.masked_fill(hidden, float("-inf")), sinks), v[:, :length])


def _scaled_query_in_16_bits(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    length: int,
    sinks: Any,
    scale: float,
    window: int,
    cap: float,
) -> torch.Tensor:
    scaled = (q.float() * scale).to(_sixteen_bits(q.dtype))
    return attend(scaled, k[:, :length], v[:, :length], sinks, 1.0, window, cap)


def _sixteen_bits(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.float32 else dtype


MUTANTS: dict[str, Callable[..., None]] = {
    "softmax before the mask": _each_sequence(_mask_after_softmax),
    "scores rounded to 16 bits": _each_sequence(_scores_in_16_bits),
    "scaled query rounded to 16 bits": _each_sequence(_scaled_query_in_16_bits),
    "wrong scale": _wrong_scale,
    "window off by one": _one_key_too_many,
    "sinks ignored": _sinks_ignored,
    "soft cap ignored": _cap_ignored,
    "pages reversed": _pages_reversed,
    "last key missing": _last_key_missing,
    "query head n reads KV head n % K": _other_kv_head,
    "padding left as it was": _padding_left,
}
