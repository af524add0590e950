"""Who shares which leading keys: what is found, when it is looked for, and what decoding does with it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.attention import sharing
from lockstep.attention.backend import AttentionSpec, Span
from lockstep.attention.choice import choose_backend
from lockstep.attention.paged_backend import PagedBackend
from lockstep.attention.sharing import Sharing, SharingFinder, find_sharing, most_tiles
from lockstep.attention.spans import Spans
from lockstep.attention.table_parts import DecodeTables, ExtendTables
from lockstep.core.capabilities import Capabilities
from lockstep.kv.pool.pool import LayerKV
from lockstep.ops.attention_decode.reference import attention_decode
from lockstep.ops.attention_decode_shared.tiles import ROWS
from lockstep.ops.attention_extend.cases import Layer
from lockstep.ops.contract import Kernel
from lockstep.ops.registry import kernels
from lockstep.ops.selection import KernelSelector

pytestmark = pytest.mark.suite("cpu")

PAGE_SIZE = 4
LAYER = Layer(6, 2, 32, PAGE_SIZE)


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "FEWEST_SAVED", 2 * PAGE_SIZE)


def single(*sequences: tuple[int, Sequence[int]]) -> Spans:
    """Single tokens of sequences with so many keys, in these pages."""
    return Spans.of([Span(keys - 1, 1, pages) for keys, pages in sequences], PAGE_SIZE)


def groups_of(found: Sharing | None) -> dict[tuple[int, ...], int]:
    """The members of each tile and how many keys they share."""
    assert found is not None
    tiles = (tuple(each for each in tile if each >= 0) for tile in found.tiles_TR.tolist())
    return {tile: int(found.shared_keys_B[tile[0]]) for tile in tiles}


def check(spans: Spans, found: Sharing) -> None:
    """What the operator asks for: tiles of the same pages, one for each sequence, and a key of its own."""
    seen: set[int] = set()
    for members, num_keys in groups_of(found).items():
        num_pages, rest = divmod(num_keys, PAGE_SIZE)
        assert num_pages > 0 and rest == 0 and not seen & set(members)
        seen |= set(members)
        for each in members:
            assert found.shared_keys_B[each] == num_keys < spans.num_keys_B[each]
            assert np.array_equal(
                spans.page_ids_BP[each, :num_pages], spans.page_ids_BP[members[0], :num_pages]
            )
    assert not found.shared_keys_B[[each for each in range(len(spans)) if each not in seen]].any()
    assert len(found.tiles_TR) <= most_tiles(len(spans)) and found.tiles_TR.shape[1] == ROWS


def test_one_prefix_and_a_sequence_of_another() -> None:
    spans = single((14, [1, 2, 3, 4]), (13, [1, 2, 3, 9]), (20, [5, 6, 7, 8, 10]), (17, [1, 2, 3, 11, 12]))
    found = find_sharing(spans)
    assert groups_of(found) == {(0, 1, 3): 12}
    assert found is not None and found.shared_keys_B.tolist() == [12, 12, 0, 12]


def test_the_page_of_the_newest_key_is_not_shared() -> None:
    """Not even where it is the same page: it has room for a key that somebody stores just now."""
    spans = single((12, [1, 2, 3]), (12, [1, 2, 3]), (13, [1, 2, 3, 4]))
    assert groups_of(find_sharing(spans)) == {(0, 1, 2): 8}


def test_one_that_shares_little_does_not_spoil_it() -> None:
    many = [(41, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 20 + each]) for each in range(4)]
    assert groups_of(find_sharing(single(*many, (9, [1, 2, 30])))) == {(0, 1, 2, 3): 40}
    # Little of many is more than much of a few.
    few = [(13, [1, 2, 3 + each // 2, 40 + each]) for each in range(20)]
    assert groups_of(find_sharing(single(*few))) == {tuple(range(20)): 8}
    # And what a group leaves may share what all have.
    rest = [(13, [1, 2, 50 + each, 60 + each]) for each in range(3)]
    found = groups_of(find_sharing(single(*many, *rest)))
    assert found == {(0, 1, 2, 3): 40, (4, 5, 6): 8}


def test_what_does_not_pay() -> None:
    assert find_sharing(single((9, [1, 2, 3]), (9, [4, 5, 6]), (9, [7, 8, 9]))) is None
    assert find_sharing(single((6, [1, 2]), (6, [1, 3]))) is None, "one page saved"
    assert find_sharing(single((100, list(range(25))))) is None
    assert find_sharing(single()) is None


def test_groups_of_many_fill_several_tiles_and_only_the_best_count() -> None:
    spans = single(*[(9, [1, 2, 10 + each]) for each in range(2 * ROWS + 1)])
    found = find_sharing(spans)
    assert found is not None and [len(tile) for tile in groups_of(found)] == [ROWS, ROWS, 1]
    check(spans, found)
    pairs = [
        (4 * length + 1, [100 * length + at for at in range(length)] + [9000 + 2 * length + half])
        for length in range(1, 13)
        for half in (0, 1)
    ]
    found = find_sharing(single(*pairs))
    assert sorted(groups_of(found).values()) == [PAGE_SIZE * length for length in range(5, 13)]


def test_whatever_the_tables_are() -> None:
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    num_found = 0
    for _ in range(300):
        count, width = random.integers(1, 80), random.integers(1, 8)
        pages = random.integers(0, random.integers(1, 5), (count, width)).cumsum(1).astype(np.int32)
        num_keys = random.integers(1, width * PAGE_SIZE + 1, count)
        spans = Spans(num_keys - 1, np.ones(count, dtype=np.int64), pages, PAGE_SIZE)
        found = find_sharing(spans)
        num_found += found is not None
        if found is not None:
            check(spans, found)
    assert num_found > 100


def test_the_finder_looks_again_only_when_something_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    own = sharing.find_sharing

    def counted(spans: Spans) -> Sharing | None:
        calls.append(len(spans))
        return own(spans)

    monkeypatch.setattr(sharing, "find_sharing", counted)
    finder = SharingFinder()
    first = finder.of(single((9, [1, 2, 3]), (10, [1, 2, 4])))
    assert groups_of(first) == {(0, 1): 8}
    # The same ones, longer by a page.
    assert finder.of(single((13, [1, 2, 3, 5]), (14, [1, 2, 4, 6]))) is first and calls == [2]
    assert finder.of(single((13, [1, 2, 3, 5]))) is None and calls == [2, 1]
    assert finder.of(single((14, [1, 2, 3, 5]))) is None and calls == [2, 1]
    # Two that follow each other until they are long enough.
    assert finder.of(single((6, [1, 2]), (6, [1, 3]))) is None
    assert finder.of(single((7, [1, 2]), (6, [1, 3]))) is None and calls == [2, 1, 2]
    assert groups_of(finder.of(single((9, [1, 2, 3]), (9, [1, 2, 4])))) == {(0, 1): 8}


def test_what_lies_behind_a_sequences_pages_is_nobodys() -> None:
    """A slot of the page tables keeps the pages of whoever had it before."""
    finder, pages = SharingFinder(), np.array([[1, 2, 3], [1, 2, 4]], dtype=np.int32)

    def of(*num_keys: int) -> Sharing | None:
        lengths = np.array(num_keys)
        return finder.of(Spans(lengths - 1, np.ones_like(lengths), pages, PAGE_SIZE))

    assert groups_of(of(10, 11)) == {(0, 1): 8}
    assert of(11, 5) is None, "one page is shared, which is too little"
    assert groups_of(of(12, 9)) == {(0, 1): 8}


def spied(used: list[Any]) -> Kernel:
    """The reference, which no graph could hold if it said so; notes how many keys each call has shared."""
    reference = kernels("attention_decode_shared")[0]

    def function(*given: Any) -> None:
        used.append(given[5].tolist())
        reference.function(*given)

    return replace(reference, function=function, asks_host=False)


def backend_of(shared: Kernel | None) -> PagedBackend:
    decode, extend = (kernels(op)[0] for op in ("attention_decode", "attention_extend"))
    return PagedBackend(DecodeTables(replace(decode, asks_host=False), shared), ExtendTables(extend))


def step() -> tuple[torch.Tensor, LayerKV, list[Span]]:
    torch.manual_seed(3)
    pool = LayerKV(*torch.randn(2, LAYER.kv_heads, 20, PAGE_SIZE, LAYER.head_dim))
    spans = [Span(13, 1, [7, 2, 3, 4]), Span(9, 1, [7, 2, 9]), Span(2, 1, [5]), Span(19, 1, [7, 2, 11, 12, 13])]
    return torch.randn(len(spans), LAYER.heads, LAYER.head_dim), pool, spans


def alone(q_TNH: torch.Tensor, kv: LayerKV, spans: Sequence[Span]) -> torch.Tensor:
    out_TNH = torch.full_like(q_TNH, torch.nan)
    table = torch.zeros(len(q_TNH), 5, dtype=torch.int32)
    num_keys = torch.zeros(len(q_TNH), dtype=torch.int32)
    for row, span in enumerate(spans):
        table[row, : len(span.page_ids)] = torch.tensor(span.page_ids)
        num_keys[row] = span.num_kv_tokens
    attention_decode(q_TNH, kv.k_NPSH, kv.v_NPSH, table, num_keys, None, out_TNH, LAYER.scale, 0, 0.0)
    return out_TNH


def test_a_step_that_shares_is_computed_by_the_shared_kernel() -> None:
    used: list[Any] = []
    backend, (q, kv, spans), spec = backend_of(spied(used)), step(), AttentionSpec(LAYER.scale)
    for chosen, shared in ((spans, [8, 8, 0, 8]), (spans[2:], None), (spans[1:], [8, 0, 8])):
        plan = backend.plan(chosen, page_size=PAGE_SIZE, windows=(0,), device=torch.device("cpu"))
        found = backend.run(plan, q[: len(chosen)], kv, spec)
        torch.testing.assert_close(found, alone(q[: len(chosen)], kv, chosen))
        assert used == ([shared] if shared else [])
        assert backend.shares_keys(chosen, PAGE_SIZE) is (shared is not None)
        used.clear()


def test_a_fixed_plan_follows_who_shares() -> None:
    used: list[Any] = []
    backend, (q, kv, spans), spec = backend_of(spied(used)), step(), AttentionSpec(LAYER.scale)
    num_keys_T = torch.zeros(4, dtype=torch.int32)
    plan = backend.fixed_plan(num_keys_T, num_pages=20, page_size=PAGE_SIZE, shares=True)
    tables = plan.decode.shared
    addresses = [tables.shared_keys_B.data_ptr(), tables.tiles_TR.data_ptr()]
    assert not backend.run(plan, q, kv, spec).any(), "all rows are padding at first"
    for chosen, shared in ((spans, [8, 8, 0, 8]), (spans[2:], [0] * 4), (spans[1:], [8, 0, 8, 0])):
        lengths = [span.num_kv_tokens for span in chosen]
        num_keys_T.copy_(torch.tensor([*lengths, *[0] * (4 - len(chosen))]))
        backend.refill(plan, chosen)
        torch.testing.assert_close(backend.run(plan, q, kv, spec), alone(q, kv, chosen))
        assert used[-1] == shared
        assert tables.tiles_TR.shape == (most_tiles(4), ROWS)
        assert (tables.tiles_TR >= 0).sum() == sum(map(bool, shared))
    assert [tables.shared_keys_B.data_ptr(), tables.tiles_TR.data_ptr()] == addresses
    assert all(address % 16 == 0 for address in addresses)


def test_without_such_a_kernel_nobody_looks() -> None:
    backend, spans = backend_of(None), step()[2]
    assert not backend.shares_keys(spans, PAGE_SIZE)
    plan = backend.plan(spans, page_size=PAGE_SIZE, windows=(0,), device=torch.device("cpu"))
    assert plan.decode.shared is None
    assert backend_of(kernels("attention_decode_shared")[0]).why_no_graphs == (
        "attention_decode_shared.reference reads values on the host"
    )


GPU = Capabilities(
    platform="rocm", device_type="cuda", device_name="a test", features=frozenset({"triton"}), has_triton=True
)


@pytest.mark.parametrize(
    ("layer", "forced", "bound"),
    [
        (Layer(4, 2), {}, "triton"),
        (Layer(4, 2, window=8), {}, "parts"),
        (Layer(4, 2), {"attention_decode_shared": "reference"}, "parts"),
        (Layer(4, 2), {"attention_decode": "triton"}, "parts"),
    ],
    ids=["bound", "a window", "turned off", "a part is forced"],
)
def test_which_kernel_is_bound(layer: Layer, forced: dict[str, str], bound: str) -> None:
    backend, bindings = choose_backend(
        "auto", KernelSelector(GPU, ("triton",), forced=forced), ("triton",), layer.signature(torch.bfloat16)
    )
    assert [each.kernel.provider for each in bindings if each.op == "attention_decode_shared"] == [bound]
    assert isinstance(backend, PagedBackend)
    spans = step()[2]
    assert backend.shares_keys(spans, PAGE_SIZE) is (bound == "triton")
