"""Shapes: T tokens, K experts of each token, P = T * K pairs, E experts, R padded rows, B rows of a block."""

from __future__ import annotations

import torch


def num_padded_rows(num_pairs: int, num_experts: int, block_size: int) -> int:
    """Rows that any routing of so many pairs fits in: each expert that is hit may leave a block nearly empty."""
    worst = num_pairs + min(num_experts, num_pairs) * (block_size - 1)
    return worst // block_size * block_size


def moe_align(
    ids_TK: torch.Tensor, num_experts: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pairs (token, choice) in the order of their experts, each expert padded to whole blocks of rows.

    Pair p = t * K + k. Gives, all int32: `pairs` [R], the pair of each row, expert by expert and in ascending order
    within one, P in rows of padding; `block_experts` [R / B], the expert of each block, -1 for blocks that are not
    used; `num_rows` [1], the rows in use, whole blocks of them. R is the worst case of `num_padded_rows`, so that
    sizes do not depend on the routing. Pairs with id -1 belong to other ranks and get no row.
    """
    ids_P = ids_TK.flatten().long()
    num_pairs = len(ids_P)
    num_rows = num_padded_rows(num_pairs, num_experts, block_size)
    is_mine_PE = ids_P[:, None] == torch.arange(num_experts, device=ids_P.device)
    padded_E = (is_mine_PE.sum(0) + block_size - 1) // block_size * block_size
    ends_E = padded_E.cumsum(0)
    row_PE = is_mine_PE.cumsum(0) - 1 + ends_E - padded_E
    # Pairs without an expert all go to one more row, which is cut off.
    row_P = torch.where(is_mine_PE, row_PE, 0).sum(1).where(ids_P >= 0, num_rows)
    pairs_R = torch.full((num_rows + 1,), num_pairs, dtype=torch.int32, device=ids_P.device)
    pairs_R[row_P] = torch.arange(num_pairs, dtype=torch.int32, device=ids_P.device)
    starts_B = torch.arange(0, num_rows, block_size, device=ids_P.device)
    experts_B = (starts_B[:, None] >= ends_E).sum(1)
    block_experts_B = experts_B.where(experts_B < num_experts, -1)
    return pairs_R[:num_rows], block_experts_B.to(torch.int32), ends_E[-1:].to(torch.int32)
