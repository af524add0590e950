"""Shapes: R rows, V vocabulary, S sequences."""

from __future__ import annotations

import torch

from lockstep.ops.argmax.reference import argmax


def choose_greedy(logits_RV: torch.Tensor, owners_R: torch.Tensor, last_tokens_S: torch.Tensor) -> torch.Tensor:
    """The largest value of each row and its place, as argmax finds them, packed as int32 [2, R].

    First the places, then the values as bits of float32, where zero has no sign. Place r is written to
    last_tokens[owners[r]], unless that is 0: such a row is nobody's. No two other rows have one owner.
    """
    best_R, token_ids_R = argmax(logits_RV)
    is_owned_R = owners_R != 0
    last_tokens_S[owners_R[is_owned_R]] = token_ids_R[is_owned_R]
    return torch.stack((token_ids_R.int(), (best_R.float() + 0.0).view(torch.int32)))
