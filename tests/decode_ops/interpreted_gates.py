"""Holds products in gated blocks against float64, in Triton's interpreter: `python interpreted_gates.py SEED ROUNDS`.

Rows, outputs and inputs at random, seldom whole blocks; orders of blocks and numbers of programs too. Exits 1 on a
failure.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "ops_basic"))

import torch
from triton_interpreter import as_processors_do

from lockstep.ops.linear import gated_blocks
from lockstep.ops.linear.tiles import GatedBlock

TOLERANCE = 2.0**-8
"""Of the result, and of 1: the results' one rounding to bfloat16 is at most that much of them."""


def drawn_round(draw: random.Random) -> str:
    """What was computed, and an empty string or what is wrong with it."""
    rows, outputs, inputs = draw.randint(1, 100), 8 * draw.randint(1, 12), 8 * draw.randint(1, 12)
    block = GatedBlock(draw.choice((16, 32)), draw.choice((16, 32)), 32, draw.randint(1, 5), 1, 4, 3)
    programs = gated_blocks._INTERPRETED_PROGRAMS = draw.randint(1, 9)
    gated_blocks._processors.cache_clear()
    has_bias = draw.random() < 0.5
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    wide = torch.randn(rows, 2 * inputs, generator=generator).bfloat16()
    x = wide[:, inputs:]  # rows lie apart
    weight = (torch.randn(2 * outputs, inputs, generator=generator) * inputs**-0.5).bfloat16()
    bias = torch.randn(2 * outputs, generator=generator).bfloat16() if has_bias else None
    assert gated_blocks.can_be_gated(x, weight)
    found = gated_blocks.gated_product(x, weight, bias, block).double()
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    gate, up = exact.chunk(2, -1)
    wanted = torch.nn.functional.silu(gate) * up
    off = ((found - wanted).abs() / (wanted.abs() + 1)).max().item()
    what = f"{rows}x{inputs}x{outputs}, bias {has_bias}, {programs} programs, {block}: off by {off:.2g}"
    return what if not off <= TOLERANCE else ""


def main(seed: int, rounds: int) -> int:
    torch.set_num_threads(1)
    as_processors_do()
    draw = random.Random(seed)
    wrong = [what for what in (drawn_round(draw) for _ in range(rounds)) if what]
    print(f"seed {seed}: {len(wrong)} of {rounds} wrong", *wrong[:5], sep="\n")
    return 1 if wrong or not rounds else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
