"""One Triton program for all that is looked up of a row."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel
from lockstep.ops.rows import refuses_wide_rows


def begin_rows(
    token_ids_T: torch.Tensor,
    sources_T: torch.Tensor | None,
    last_tokens_S: torch.Tensor | None,
    positions_T: torch.Tensor,
    table_VD: torch.Tensor,
    cos_sin_2PR: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract."""
    from lockstep.ops.begin_rows.programs import begin

    return begin(token_ids_T, sources_T, last_tokens_S, positions_T, table_VD, cos_sin_2PR)


KERNELS = (
    Kernel(
        op="begin_rows",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=begin_rows,
        platforms=frozenset({"cuda", "rocm", "musa"}),
        features=frozenset({"triton"}),
        refuses=refuses_wide_rows,
    ),
)
