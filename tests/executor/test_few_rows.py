"""Steps of a few single tokens go to the kernel that computes all blocks, all others to the layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from lockstep.attention.backend import AttentionBackend, Span
from lockstep.attention.paged_backend import PagedBackend, SharedTables
from lockstep.attention.table_parts import DecodeTables, ExtendTables
from lockstep.core.errors import KernelError
from lockstep.executor.fused import FewRowsFused
from lockstep.kv.pool.pool import KVPool, KVShape
from lockstep.layers.build import ForwardContext
from lockstep.layers.tokens import Tokens
from lockstep.models.llm.decoder import DecoderModel
from lockstep.ops.contract import Kernel

pytestmark = pytest.mark.suite("cpu", seconds=2)

PAGE_SIZE, MOST_ROWS, BLOCKS = 4, 3, 2
HIDDEN = torch.tensor([7.0, 8.0, 9.0])


class Layers:
    """In the place of a built model."""

    config, head = "config", "head"

    def begin(self, ctx: ForwardContext, tokens: Tokens) -> tuple[torch.Tensor, Any]:
        return tokens.ids() * 10, (ctx.positions_T, ctx.positions_T + 1)

    def forward(self, ctx: ForwardContext, tokens: Tokens) -> torch.Tensor:
        return -tokens.ids()

    def outline(self) -> str:
        return "outline"

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        return hidden_RD + 1


def never(*given: Any) -> None:
    raise AssertionError("nothing is attended to here")


def backend() -> PagedBackend:
    return PagedBackend(
        DecodeTables(Kernel("attention_decode", "mine", never)),
        ExtendTables(Kernel("attention_extend", "mine", never)),
    )


class Fused:
    """The wrapped model, and what its kernel was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.pool = KVPool(
            (KVShape(2, 8),) * BLOCKS,
            num_pages=9,
            page_size=PAGE_SIZE,
            dtype=torch.float32,
            allocate=lambda shape, dtype: torch.zeros(shape, dtype=dtype),
        )

        def prepare(outline: Any) -> Any:
            assert outline == "outline"
            return SimpleNamespace(most_rows=MOST_ROWS)

        def kernel(*given: Any) -> torch.Tensor:
            self.calls.append(given)
            return HIDDEN

        made = Kernel("decoder_decode", "mine", kernel, prepare=prepare, opaque=True)
        self.model = FewRowsFused(cast(DecoderModel, Layers()), made)

    def run(
        self, attention: AttentionBackend, plan: Any, rows: int, wanted_R: torch.Tensor | None = None
    ) -> torch.Tensor:
        numbers = torch.arange(rows) + 1
        return self.model.forward(
            ForwardContext(numbers, numbers, attention, plan, self.pool, wanted_R), Tokens(numbers)
        )


def planned(attention: PagedBackend, *spans: Span) -> Any:
    return attention.plan(spans, page_size=PAGE_SIZE, windows=(0,), device=torch.device("cpu"))


def single(start: int, *pages: int) -> Span:
    return Span(start, 1, pages)


def test_single_tokens_go_to_the_kernel() -> None:
    fused, attention = Fused(), backend()
    assert fused.run(attention, planned(attention, single(5, 3, 1), single(0, 2)), 2) is HIDDEN
    ((rows, cos, sin, table, num_keys, program, kv),) = fused.calls
    assert rows.tolist() == [10, 20] and cos.tolist() == [1, 2] and sin.tolist() == [2, 3]
    assert table[0, :2].tolist() == [3, 1] and table[1, 0] == 2 and num_keys.tolist() == [6, 1]
    assert program.most_rows == MOST_ROWS
    assert kv.shape == (BLOCKS, 2, 2, 9, PAGE_SIZE, 8)
    for block, layer in enumerate(fused.pool.layers):
        layer.k_NPSH.fill_(block), layer.v_NPSH.fill_(-block - 1)
        assert (kv[block, 0] == block).all() and (kv[block, 1] == -block - 1).all()
    assert fused.model.logits(HIDDEN).tolist() == [8, 9, 10]
    assert fused.model.config == "config" and fused.model.head == "head"


def test_wanted_rows_of_single_tokens() -> None:
    fused, attention = Fused(), backend()
    plan = planned(attention, *(single(at, at) for at in range(3)))
    assert fused.run(attention, plan, 3, torch.tensor([2, 0])).tolist() == [9, 7]
    assert len(fused.calls) == 1


def test_padding_of_a_recorded_step_is_known_to_the_kernel() -> None:
    fused, attention = Fused(), backend()
    num_keys = torch.zeros(3, dtype=torch.int32)
    plan = attention.fixed_plan(num_keys, num_pages=4, page_size=PAGE_SIZE)
    assert fused.run(attention, plan, 3) is HIDDEN
    assert fused.calls[0][4] is num_keys


@pytest.mark.parametrize("kind", ["a longer span", "both", "more rows", "shared keys", "rows beside the plan"])
def test_other_steps_are_the_layers_own(kind: str) -> None:
    fused, attention = Fused(), backend()
    rows = 3
    if kind == "a longer span":
        plan = planned(attention, Span(0, 3, (1,)))
    elif kind == "both":
        plan = planned(attention, single(1, 2), Span(0, 2, (1,)))
    elif kind == "more rows":
        rows = MOST_ROWS + 1
        plan = planned(attention, *(single(at, at) for at in range(rows)))
    elif kind == "shared keys":
        plan = attention.fixed_plan(
            torch.zeros(3, dtype=torch.int32), num_pages=4, page_size=PAGE_SIZE, shares=True
        )
        assert isinstance(plan.decode.shared, SharedTables)
    else:
        plan = planned(attention, single(1, 2))
    assert fused.run(attention, plan, rows).tolist() == [-row for row in range(1, rows + 1)]
    assert not fused.calls


def test_attention_without_tables_takes_all_steps() -> None:
    class Other(AttentionBackend):
        name = "other"
        plan = run = never

    assert backend().has_tables and not Other().has_tables
    fused = Fused()
    assert fused.run(Other(), None, 1).tolist() == [-1]


def test_it_is_made_of_a_built_model() -> None:
    with pytest.raises(KernelError, match="made of a built model"):
        FewRowsFused.make(cast(Any, None), {})
