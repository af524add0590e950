"""Shapes: T rows, S sequences, V vocabulary, D model, P positions, R2 rotated pairs."""

from __future__ import annotations

from typing import Optional

import torch


def begin_rows(
    token_ids_T: torch.Tensor,
    sources_T: Optional[torch.Tensor],  # noqa: UP045 - the annotation is read as a schema
    last_tokens_S: Optional[torch.Tensor],  # noqa: UP045
    positions_T: torch.Tensor,
    table_VD: torch.Tensor,
    cos_sin_2PR: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [T, D] of the table, and the angles [2, T, R2] of these positions.

    A row's token is token_ids[row] + last_tokens[sources[row]], or token_ids[row] where there are no sources.
    """
    if sources_T is not None and last_tokens_S is not None:
        token_ids_T = token_ids_T + last_tokens_S.index_select(0, sources_T)
    return table_VD.index_select(0, token_ids_T), cos_sin_2PR.index_select(1, positions_T)
