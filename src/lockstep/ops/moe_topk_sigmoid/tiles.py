"""How many lanes of a warp share a row in the Triton kernel of sigmoid routing."""

from __future__ import annotations

from lockstep.ops.moe_topk_softmax import tiles

LANES_FROM = ((1 << 17, 2), (0, 4))
"""From so many tokens on, so many lanes to a row.

A token of 256 float32 logits in 8 groups takes a warp 138, 151 and 194 instructions with 1, 2 and 4 lanes; one lane has
too few registers for them, and eight lanes are more than a group of few experts can use.
"""


def lanes_for(num_tokens: int, num_experts: int) -> int:
    """Lanes that share a row, of so many tokens and experts; eight at most."""
    return tiles.lanes_for(num_tokens, num_experts, LANES_FROM)
