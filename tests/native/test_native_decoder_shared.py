"""A whole decoder as one native call: sequences read pages that other sequences of the same step fill."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lockstep.native import usable_instruction_sets
from lockstep.ops.decoder_forward.cases import Decoder, step
from lockstep.ops.decoder_forward.kernels.native import Program

pytestmark = [pytest.mark.suite("cpu", seconds=15), pytest.mark.usefixtures("native")]

NUM_ROWS = 600
"""More than two of the blocks that rows are multiplied in."""

Span = tuple[int, int]
"""First and last + 1 of the prompt's rows."""


class Prompt:
    """One random prompt in empty pages, of which steps compute some rows each."""

    def __init__(self, instruction_set: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        given = step(generator, Decoder("4 bits, minima"), ((NUM_ROWS, NUM_ROWS),), torch.bfloat16)
        self._tokens, self._positions, self._slots, table, _, _, outline, self._empty = given
        self._pages = table.flatten().numpy()
        self._program = Program(outline, instruction_set)

    def run(self, *steps: tuple[Span, ...], num_wanted: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden rows of the prompt and the pools after these steps, of spans that stand for a sequence each.

        All rows are wanted, or so many of each span.
        """
        pools = self._empty.clone()
        kv, hidden = list(pools.unbind()), torch.zeros(NUM_ROWS, 64)
        for spans in steps:
            taken = torch.cat([torch.arange(*span) for span in spans])
            rows, first = [], 0
            for start, end in spans:
                count = end - start
                rows.append((first, count, end, 0, count if num_wanted is None else num_wanted))
                first += count
            where = (self._tokens[taken], self._positions[taken], self._slots[taken])
            hidden[taken] = self._program.step(*where, np.array(rows, dtype=np.int32), self._pages, kv)
        return hidden, pools


SPANS: dict[str, tuple[Span, ...]] = {
    "of many rows": ((0, 320), (320, NUM_ROWS)),
    "of one row": ((0, NUM_ROWS - 1), (NUM_ROWS - 1, NUM_ROWS)),
    "three in a chain": ((0, 16), (16, 400), (400, NUM_ROWS)),
}


@pytest.mark.parametrize("num_wanted", [None, 1], ids=["all rows", "the last rows"])
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("instruction_set", usable_instruction_sets())
def test_rows_see_what_other_sequences_of_their_step_store(
    instruction_set: str, spans: tuple[Span, ...], num_wanted: int | None
) -> None:
    """In any order, to the bit as if the steps came one after the other."""
    prompt = Prompt(instruction_set, seed=21)
    hidden, pools = prompt.run(*((span,) for span in spans), num_wanted=num_wanted)
    for together in (spans, spans[::-1]):
        found, kept = prompt.run(together, num_wanted=num_wanted)
        assert torch.equal(found, hidden) and torch.equal(kept, pools)
    lonely, _ = prompt.run((spans[-1],), num_wanted=num_wanted)
    assert not torch.equal(lonely[-1], hidden[-1]), "what the others store changes nothing"
