"""A whole decoder as one native call: the same bits in any company, and nothing outside its memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.engine.llm import LLM
from lockstep.executor.fused import FusedDecoder
from lockstep.native import usable_instruction_sets
from lockstep.ops.decoder_forward.cases import KINDS, VOCAB_SIZE, Decoder, step
from lockstep.ops.decoder_forward.kernels.native import Program
from lockstep.ops.decoder_forward.reference import product

pytestmark = [pytest.mark.suite("cpu", seconds=5), pytest.mark.usefixtures("native")]

BATCH = ((1, 37), (9, 9), (1, 1), (45, 60), (1, 700))
SETS = usable_instruction_sets()


class Prepared:
    """A random decoder, a step of several sequences, and the step's parts."""

    def __init__(self, kind: str, instruction_set: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        given = step(generator, Decoder(kind), BATCH, torch.bfloat16)
        self.tokens, self.positions, self.slots, table, self.cu_rows, self.num_keys, self.outline, kv = given
        self.pages = table.flatten().numpy()
        self.width = table.shape[1]
        self.pristine = kv
        self.program = Program(self.outline, instruction_set)

    def run(self, *sequences: int, num_wanted: Sequence[int] | None = None, **changed: Any) -> torch.Tensor:
        """Hidden rows of some of the sequences, in a pool as it was before; of all rows, or so many of each."""
        return self.run_and_keep(*sequences, num_wanted=num_wanted, **changed)[0]

    def run_and_keep(
        self, *sequences: int, num_wanted: Sequence[int] | None = None, **changed: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden rows, and the pool after it."""
        rows = [torch.arange(int(self.cu_rows[at]), int(self.cu_rows[at + 1])) for at in sequences]
        spans, first = [], 0
        wanted = [len(own) for own in rows] if num_wanted is None else num_wanted
        for at, own, count in zip(sequences, rows, wanted, strict=True):
            spans.append((first, len(own), int(self.num_keys[at]), at * self.width, count))
            first += len(own)
        taken = torch.cat(rows)
        arguments: dict[str, Any] = {
            "token_ids_T": self.tokens[taken],
            "positions_T": self.positions[taken],
            "slots_T": self.slots[taken],
            "spans": np.array(spans, dtype=np.int32),
            "pages": self.pages,
            **changed,
        }
        kv = self.pristine.clone()
        return self.program.step(**arguments, kv=list(kv.unbind())), kv


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_any_company(kind: str, instruction_set: str) -> None:
    prepared = Prepared(kind, instruction_set, seed=3)
    alone = [prepared.run(at) for at in range(len(BATCH))]
    assert torch.equal(prepared.run(0, 1, 2, 3, 4), torch.cat(alone))
    assert torch.equal(prepared.run(4, 0, 2), torch.cat([alone[4], alone[0], alone[2]]))


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("num_wanted", [(1, 1, 1, 1, 1), (0, 3, 0, 40, 1), (0, 0, 0, 0, 0), (1, 9, 1, 44, 0)])
def test_what_is_wanted_changes_no_bit(num_wanted: tuple[int, ...], instruction_set: str) -> None:
    """Rows that nobody wants are zeros, and their keys and values are stored all the same."""
    prepared = Prepared("4 bits, minima", instruction_set, seed=8)
    every, kv = prepared.run_and_keep(0, 1, 2, 3, 4)
    some, kv_of_some = prepared.run_and_keep(0, 1, 2, 3, 4, num_wanted=num_wanted)
    assert torch.equal(kv_of_some, kv)
    first = 0
    for (rows, _), wanted in zip(BATCH, num_wanted, strict=True):
        end = first + rows
        assert torch.equal(some[end - wanted : end], every[end - wanted : end])
        assert not some[first : end - wanted].any()
        first = end


def test_the_number_of_threads_changes_no_bit() -> None:
    prepared = Prepared("4 bits, minima", SETS[0], seed=4)
    several = prepared.run(0, 1, 2, 3, 4)
    prepared.program.num_threads = 1
    assert torch.equal(prepared.run(0, 1, 2, 3, 4), several)


@pytest.mark.parametrize("instruction_set", SETS)
def test_scores_are_finer_than_eight_bits(instruction_set: str) -> None:
    """Their inputs are taken twice, so what the first rounding to eight bits takes is given back by the second."""
    prepared = Prepared("8 bits", instruction_set, seed=5)
    hidden = torch.randn(19, 64, generator=torch.Generator().manual_seed(6))
    expected = product(prepared.outline.head, hidden.double())
    found = prepared.program.scores(hidden)
    assert found.shape == (19, VOCAB_SIZE)
    rounded = (hidden * 127 / hidden.abs().max()).round() * hidden.abs().max() / 127
    coarse = (product(prepared.outline.head, rounded.double()) - expected).abs().max()
    assert (found - expected).abs().max() < coarse / 20


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("token_ids_T", torch.full((1,), VOCAB_SIZE), "token id"),
        ("positions_T", torch.full((1,), 10**6), "position"),
        ("slots_T", torch.full((1,), 10**6), "slot"),
        ("slots_T", torch.zeros(2, dtype=torch.int64), "one position, slot"),
        ("pages", np.full(200, 10**6, dtype=np.int32), "page is out of range"),
        ("pages", np.zeros(0, dtype=np.int32), "fewer pages than keys"),
        ("spans", np.array([[0, 2, 37, 0, 2]], dtype=np.int32), "do not cover the rows"),
        ("spans", np.array([[0, 1, 0, 0, 1]], dtype=np.int32), "with rows and keys"),
        ("spans", np.array([[0, 1, 37, 0, 2]], dtype=np.int32), "wants more rows"),
    ],
)
def test_what_would_leave_its_memory_is_refused(name: str, value: Any, says: str) -> None:
    prepared = Prepared("8 bits", SETS[0], seed=7)
    with pytest.raises(ValueError, match=says):
        prepared.run(0, **{name: value})


def test_a_model_uses_the_threads_that_it_was_given() -> None:
    """--threads is heard by the native threads, and torch's own stay out of their way."""
    with LLM(threads=1, max_total_tokens=512) as llm:
        model = llm._engine.rank.core.executor._model  # type: ignore[attr-defined]
        assert isinstance(model, FusedDecoder)
        assert model._program.num_threads == 1 == torch.get_num_threads()
