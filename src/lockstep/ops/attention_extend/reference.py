"""Shapes: T new tokens, N query heads, K KV heads, H head dim, P pages, S page size, B sequences, L keys."""

from __future__ import annotations

import torch


def attention_extend(
    q_TNH: torch.Tensor,
    k_KPSH: torch.Tensor,
    v_KPSH: torch.Tensor,
    page_table_BP: torch.Tensor,
    cu_rows_B1: torch.Tensor,
    num_keys_B: torch.Tensor,
    sinks_N: torch.Tensor | None,
    out_TNH: torch.Tensor,
    scale: float,
    window: int,
    soft_cap: float,
) -> None:
    """Causal attention of each sequence's new tokens over its own keys, written to `out_TNH`.

    Rows cu_rows[b] .. cu_rows[b + 1] belong to sequence b and are the last of its num_keys[b] tokens, whose keys lie
    in the pages page_table[b] in order. A token at position p sees keys at positions max(0, p - window + 1) .. p
    (window 0: from 0). Scores are capped as cap * tanh(score / cap) when `soft_cap` is not 0. A sink is one more
    logit of each head in the softmax, without a value. Query head n reads KV head n // (N / K). float32 maths, one
    rounding to the dtype of out. Rows after the last sequence, and those of sequences without keys, become zeros.
    """
    out_TNH.zero_()
    bounds = cu_rows_B1.tolist()
    for index, num_keys in enumerate(num_keys_B.tolist()):
        rows = slice(bounds[index], bounds[index + 1])
        if num_keys == 0:
            continue
        num_pages = -(-num_keys // k_KPSH.shape[2])
        pages = page_table_BP[index, :num_pages].long()
        k_KLH, v_KLH = (pool[:, pages].flatten(1, 2)[:, :num_keys] for pool in (k_KPSH, v_KPSH))
        out_TNH[rows] = attend(q_TNH[rows], k_KLH, v_KLH, sinks_N, scale, window, soft_cap).to(out_TNH.dtype)


def attend(
    q_TNH: torch.Tensor,
    k_KLH: torch.Tensor,
    v_KLH: torch.Tensor,
    sinks_N: torch.Tensor | None,
    scale: float,
    window: int,
    soft_cap: float,
) -> torch.Tensor:
    """out [T, N, H] in float32 of the last T of L tokens; see attention_extend.

    Sources: grouped heads, Ainslie et al. 2023; sinks, the gpt-oss model card, 2025; soft cap, Gemma Team 2024.
    """
    scores_KGTL = scores(q_TNH, k_KLH, scale, soft_cap)
    hidden_TL = hidden_keys(q_TNH.shape[0], k_KLH.shape[1], window, q_TNH.device)
    weights_KGTL = softmax_with_sinks(scores_KGTL.masked_fill(hidden_TL, float("-inf")), sinks_N)
    return (weights_KGTL @ v_KLH.float()[:, None]).flatten(0, 1).transpose(0, 1)


def scores(q_TNH: torch.Tensor, k_KLH: torch.Tensor, scale: float, soft_cap: float) -> torch.Tensor:
    """[K, G, T, L] in float32, with G the query heads of a KV head: scaled, then capped."""
    q_KGTH = q_TNH.float().transpose(0, 1).unflatten(0, (k_KLH.shape[0], -1))
    scaled_KGTL = q_KGTH @ k_KLH.float()[:, None].transpose(-1, -2) * scale
    return soft_cap * torch.tanh(scaled_KGTL / soft_cap) if soft_cap else scaled_KGTL


def softmax_with_sinks(scores_KGTL: torch.Tensor, sinks_N: torch.Tensor | None) -> torch.Tensor:
    """Weights of the keys; a head's sink takes its share and leaves the rest."""
    if sinks_N is None:
        return torch.softmax(scores_KGTL, dim=-1)
    sinks_KGT1 = sinks_N.to(scores_KGTL).view(*scores_KGTL.shape[:2], 1, 1).expand(*scores_KGTL.shape[:3], 1)
    return torch.softmax(torch.cat((scores_KGTL, sinks_KGT1), dim=-1), dim=-1)[..., :-1]


def hidden_keys(num_rows: int, num_keys: int, window: int, device: torch.device) -> torch.Tensor:
    """[T, L], true where the key lies after the row's position or before its window."""
    position_T1 = torch.arange(num_keys - num_rows, num_keys, device=device)[:, None]
    key_L = torch.arange(num_keys, device=device)
    hidden_TL = key_L > position_T1
    return hidden_TL | (key_L <= position_T1 - window) if window else hidden_TL
