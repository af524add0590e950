"""Cached prefixes that go to the host and come back: right contents, the hits of an unbounded cache, self-checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest

from lockstep.core.errors import IntegrityError
from lockstep.core.step import PageCopy
from lockstep.kv.index.page_index import PageIndex, PageTable

pytestmark = pytest.mark.suite("cpu", seconds=10)

PAGE_SIZE = 2
Prefix = tuple[int, ...]


@dataclass
class Memory:
    """What pages hold, by the whole prefix that ends in them; copies move it."""

    device: dict[int, Prefix] = field(default_factory=dict)
    host: dict[int, Prefix] = field(default_factory=dict)

    def perform(self, copies: tuple[PageCopy, ...]) -> None:
        for copy in copies:
            if copy.to_host:
                self.host[copy.host_page_id] = self.device[copy.page_id]
            else:
                self.device[copy.page_id] = self.host[copy.host_page_id]


class Traffic:
    """Random sequences over an index, each written to memory as it is computed."""

    def __init__(self, rng: Random, *, num_host_pages: int) -> None:
        self.rng = rng
        self.index = PageIndex(rng.randint(10, 24), PAGE_SIZE, num_host_pages=num_host_pages)
        self.memory = Memory()
        self.copies: list[PageCopy] = []
        self.computed: set[Prefix] = set()
        """Every prefix that an unbounded cache would hold."""
        self.num_hits_short = 0
        self._live: dict[PageTable, tuple[Prefix, int]] = {}

    def step(self) -> None:
        roll = self.rng.random()
        if len(self._live) < 3 and (roll < 0.6 or not self._live):
            self.begin()
        elif roll < 0.99:
            self.end(self.rng.choice(list(self._live)))
        else:
            self.index.flush()
            locked = {p for tokens, count in self._live.values() for p in prefixes(tokens, count)}
            self.computed &= locked
        self.index.check()
        host = self.index
        assert host.num_host_pages_cached <= host.num_host_pages_total

    def begin(self) -> None:
        tokens = tuple(self.rng.randrange(2) for _ in range(self.rng.randint(1, 10)))
        table = self.index.begin(tokens)
        hit = table.num_cached_tokens // PAGE_SIZE
        expected = 0
        for prefix in prefixes(tokens, (len(tokens) - 1) // PAGE_SIZE):
            if prefix not in self.computed:
                break
            expected += 1
        assert hit <= expected
        self.num_hits_short += hit < expected
        self.index.check()
        before = list(table.page_ids)
        new = self.index.grow(table, len(tokens))
        copies = self.index.take_copies()
        if new is None:
            assert not copies
            self.index.release(table)
            return
        self.copies += copies
        self.memory.perform(copies)
        assert table.page_ids == [*before, *new] and table.num_shared_pages == hit
        self.expect(table, tokens, hit)
        for page_id, prefix in list(
            zip(table.page_ids, prefixes(tokens, len(tokens) // PAGE_SIZE), strict=False)
        )[hit:]:
            self.memory.device[page_id] = prefix
        self._live[table] = (tokens, hit)
        if self.rng.random() < 0.5:
            self.index.commit(table, tokens, len(tokens))
            if table.num_shared_pages > hit:
                self._live[table] = (tokens, table.num_shared_pages)
                self.computed.update(prefixes(tokens, len(tokens) // PAGE_SIZE))

    def end(self, table: PageTable) -> None:
        tokens, num_shared = self._live.pop(table)
        self.expect(table, tokens, num_shared)
        kept = self.rng.random() < 0.9
        self.index.release(table, tokens if kept else (), len(tokens) if kept else 0)
        if kept:
            self.computed.update(prefixes(tokens, len(tokens) // PAGE_SIZE))

    def expect(self, table: PageTable, tokens: Prefix, count: int) -> None:
        """The first pages of a table hold that many prefixes of its tokens."""
        for page_id, prefix in zip(table.page_ids, prefixes(tokens, count), strict=False):
            assert self.memory.device[page_id] == prefix


def prefixes(tokens: Prefix, count: int) -> list[Prefix]:
    return [tokens[: (at + 1) * PAGE_SIZE] for at in range(count)]


def run(seed: int, num_host_pages: int) -> Traffic:
    traffic = Traffic(Random(seed), num_host_pages=num_host_pages)
    for _ in range(300):
        traffic.step()
    return traffic


def test_with_room_on_the_host_nothing_is_computed_twice() -> None:
    num_loaded = 0
    for seed in range(20):
        print(f"seed {seed}")
        traffic = run(seed, num_host_pages=500)
        assert traffic.num_hits_short == 0
        num_loaded += traffic.index.num_host_cached_tokens
    assert num_loaded > 500


def test_a_small_host_forgets_and_never_mixes_up() -> None:
    num_loaded = num_short = 0
    for seed in range(40):
        print(f"seed {seed}")
        traffic = run(seed, num_host_pages=Random(seed).randint(1, 12))
        num_loaded += traffic.index.num_host_cached_tokens
        num_short += traffic.num_hits_short
    assert num_loaded > 200 and num_short > 200


def test_ranks_copy_alike() -> None:
    assert run(3, 9).copies == run(3, 9).copies != []


def test_without_a_host_nothing_is_copied() -> None:
    traffic = run(5, 0)
    assert not traffic.copies and traffic.num_hits_short > 0
    assert traffic.index.num_host_pages_total == traffic.index.num_host_cached_tokens == 0


def evicted() -> PageIndex:
    """A prefix of four pages, the last two on the host."""
    index = PageIndex(4, PAGE_SIZE, num_host_pages=4)
    tokens = (1, 2, 3, 4, 5, 6, 7, 8)
    table = index.begin(tokens)
    index.grow(table, 8)
    index.release(table, tokens, 8)
    other = index.begin((9, 9, 9, 9))
    assert index.grow(other, 4) is not None
    index.check()
    return index


def test_the_end_of_a_prefix_goes_first_and_comes_back() -> None:
    index = evicted()
    assert index.take_copies() == (PageCopy(2, 0, True), PageCopy(3, 1, True))
    again = index.begin((1, 2, 3, 4, 5, 6, 7, 8, 9))
    assert again.page_ids == [0, 1] and again.num_cached_tokens == 8
    assert index.grow(again, 9) is None, "two pages come back and one is new, but all are in use"
    assert not index.take_copies()
    index.check()


def test_what_is_computed_anew_needs_no_copy() -> None:
    """A request that may not read the cache writes the same pages again: the host's are given up for them."""
    index = evicted()
    index.take_copies()
    assert index.num_host_pages_cached == 2
    (other,) = [table for table in index._tables]
    index.release(other)
    anew = index.begin((1, 2, 3, 4, 5, 6), use_cache=False)
    index.flush()
    assert index.num_host_pages_cached == 0 and index.num_pages_cached == 0
    assert index.grow(anew, 6) is not None
    index.release(anew, (1, 2, 3, 4, 5, 6), 6)
    index.check()
    assert index.begin((1, 2, 3, 4, 5, 6, 7)).num_cached_tokens == 6 and not index.take_copies()


CORRUPTIONS: dict[str, Callable[[PageIndex], object]] = {
    "host page lost": lambda index: index._host._allocator.take(1),
    "host page freed while cached": lambda index: index._host._allocator.give_back([0]),
    "host pages miscounted": lambda index: setattr(index._tree.on_host, "num_pages", 3),
    "host leaf not on offer": lambda index: index._tree.on_host.heap.clear(),
    "children miscounted": lambda index: setattr(
        next(iter(index._tree.root.children.values())), "num_children_in_tier", 1
    ),
    "parent on the host": lambda index: setattr(
        next(iter(index._tree.root.children.values())), "tier", index._tree.on_host
    ),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_check_notices(corruption: str) -> None:
    index = evicted()
    CORRUPTIONS[corruption](index)
    with pytest.raises(IntegrityError):
        index.check()
