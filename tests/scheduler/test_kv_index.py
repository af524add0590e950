"""The page index against a naive account of pages and prefixes, and its self-check against corrupted states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest

from lockstep.core.errors import IntegrityError
from lockstep.kv.index.allocator import PageAllocator
from lockstep.kv.index.page_index import PageIndex, PageTable
from lockstep.kv.index.radix_tree import RadixTree

pytestmark = pytest.mark.suite("cpu")

NUM_RANDOM_OPERATIONS = 6_000


def test_allocator_starts_ascending_and_reuses_the_latest() -> None:
    allocator = PageAllocator(5)
    assert allocator.take(3) == [0, 1, 2]
    allocator.give_back([1])
    allocator.give_back([0])
    assert allocator.take(3) == [0, 1, 3]
    assert allocator.num_free == 1
    assert allocator.check() == [4]


@pytest.mark.parametrize("page_id", [0, 3, -1])
def test_allocator_refuses_to_free_what_is_not_in_use(page_id: int) -> None:
    allocator = PageAllocator(3)
    allocator.give_back(allocator.take(1))
    with pytest.raises(IntegrityError, match="freed while not in use"):
        allocator.give_back([page_id])


def test_allocator_refuses_to_hand_out_more_than_is_free() -> None:
    allocator = PageAllocator(3)
    allocator.take(2)
    with pytest.raises(IntegrityError, match="2 pages were taken while 1 are free"):
        allocator.take(2)
    assert allocator.check() == [2]


def test_tree_matches_whole_pages_and_splits_at_page_borders() -> None:
    tree = RadixTree(page_size=2)
    assert tree.insert((1, 2, 3, 4, 5, 6), (10, 11, 12))[1] == ()
    assert tree.match((1, 2, 3, 4, 5, 6), 6)[1] == [10, 11, 12]
    assert tree.match((1, 2, 3, 4, 5, 6), 5)[1] == [10, 11]
    assert tree.match((1, 2, 3, 9, 5, 6), 6)[1] == [10]
    assert tree.match((1, 9), 2)[1] == []
    node, duplicates = tree.insert((1, 2, 3, 4, 7, 8), (20, 21, 22))
    assert duplicates == (20, 21)
    assert tree.path_pages(node) == [10, 11, 22]
    assert sorted(tree.check({})) == [10, 11, 12, 22]


def test_tree_evicts_the_least_recently_used_leaf_from_its_end() -> None:
    tree = RadixTree(page_size=1)
    tree.insert((1, 2, 3), (0, 1, 2))
    tree.insert((1, 5), (9, 3))
    tree.insert((7, 8), (4, 5))
    used, _ = tree.match((1, 2, 3), 3)
    tree.touch(used)
    assert tree.evict(1) == [3]
    assert tree.evict(3) == [5, 4, 2]
    assert tree.match((1, 2), 2)[1] == [0, 1]
    assert tree.evict(9) == [1, 0]
    assert tree.check({}) == []


def test_tree_never_evicts_a_locked_path() -> None:
    tree = RadixTree(page_size=1)
    node, _ = tree.insert((1, 2, 3, 4), (0, 1, 2, 3))
    locked, _ = tree.match((1, 2), 2)
    tree.lock(locked)
    assert tree.num_evictable_pages == 2
    assert tree.flush() == [3, 2]
    assert tree.check({locked: 1}) == [0, 1]
    tree.unlock(locked)
    with pytest.raises(IntegrityError, match="unlocked more often"):
        tree.unlock(locked)
    assert node is not locked


def test_tree_forgets_stale_eviction_entries() -> None:
    """Using one prefix over and over must not make the eviction heap grow."""
    tree = RadixTree(page_size=1)
    node, _ = tree.insert((1, 2), (0, 1))
    for _ in range(1000):
        tree.lock(node)
        tree.unlock(node)
    assert len(tree.device.heap) < 50
    assert tree.check({}) == [0, 1]


def test_hit_leaves_the_last_token_to_compute() -> None:
    index = PageIndex(8, page_size=2)
    table = index.begin((1, 2, 3, 4))
    assert (table.page_ids, table.num_cached_tokens) == ([], 0)
    assert index.grow(table, 4) == (0, 1)
    index.release(table, (1, 2, 3, 4), 4)
    assert index.begin((1, 2, 3, 4)).num_cached_tokens == 2
    assert index.begin((1, 2, 3, 4, 5)).page_ids == [0, 1]
    assert index.begin((1, 2, 3, 4, 5), use_cache=False).page_ids == []
    index.check()


def computed(index: PageIndex, tokens: tuple[int, ...]) -> PageTable:
    """A sequence whose tokens are computed and shared."""
    table = index.begin(tokens)
    assert index.grow(table, len(tokens)) is not None
    index.commit(table, tokens, len(tokens))
    index.check()
    return table


def test_what_is_withdrawn_is_found_by_nobody_and_kept_by_its_readers() -> None:
    index = PageIndex(12, page_size=2)
    first = computed(index, (1, 2, 3, 4))
    bad = computed(index, (1, 2, 3, 4, 5, 6, 7, 8))
    reader = computed(index, (1, 2, 3, 4, 5, 6, 7, 8, 9, 9))
    assert reader.num_cached_tokens == 8 and bad.num_cached_tokens == 4
    pages = list(reader.page_ids)
    index.withdraw(bad)
    index.release(bad)
    index.check()
    assert index.begin((1, 2, 3, 4, 5, 6, 7, 8, 9)).num_cached_tokens == 4, "what it started from stays"
    index.release(first)
    index.release(reader, (1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9), 12)
    assert pages == reader.page_ids
    index.check()
    again = computed(index, (1, 2, 3, 4, 5, 6, 7, 8))
    assert again.num_cached_tokens == 4 and set(again.page_ids[2:]).isdisjoint(pages)
    index.withdraw(again)
    index.release(again)
    index.check()
    assert index.begin((1, 2, 3, 4, 5, 6, 7, 8, 9)).num_cached_tokens == 4
    assert index.flush() > 0 and index.num_pages_cached == 0
    index.check()


@pytest.mark.parametrize("num_host_pages", [0, 8])
def test_what_is_withdrawn_makes_room(num_host_pages: int) -> None:
    """Also when it is withdrawn after its sequence, and after a part of it, has gone."""
    index = PageIndex(4, page_size=2, num_host_pages=num_host_pages)
    bad = computed(index, (1, 2, 3, 4, 5, 6, 7, 8))
    index.release(bad)
    index.release(computed(index, (9, 9, 9, 9)))
    index.withdraw(bad)
    index.check()
    assert index.begin((1, 2, 3, 4, 5, 6, 7, 8, 9)).num_cached_tokens == 0
    other = index.begin((7, 7, 7, 7, 7, 7, 7, 7))
    assert index.grow(other, 8) is not None
    index.check()


def test_sequence_alone_can_always_use_the_whole_pool() -> None:
    """Even when its own tokens are cached twice over and it may not read the cache."""
    index = PageIndex(4, page_size=1)
    first = index.begin((1, 2, 3))
    index.grow(first, 3)
    index.release(first, (1, 2, 3), 3)
    table = index.begin((1, 2, 3), use_cache=False)
    assert index.grow(table, 1) is not None
    index.commit(table, (1, 2, 3), 1)
    assert index.grow(table, 4) is not None
    index.check()
    assert (index.num_pages_in_use, index.num_pages_cached, index.num_pages_free) == (4, 0, 0)


def test_grow_without_room_changes_nothing() -> None:
    index = PageIndex(3, page_size=2)
    table = index.begin((1, 2))
    assert index.grow(table, 3) == (0, 1)
    assert index.grow(table, 7) is None
    assert table.page_ids == [0, 1] and index.num_pages_free == 1
    assert index.grow(table, 4) == ()


@dataclass
class NaivePages:
    """Every cached page by the whole prefix it ends, every table by its tokens; LRU by page."""

    num_pages: int
    page_size: int
    cached: dict[tuple[int, ...], int] = field(default_factory=dict)
    last_used: dict[tuple[int, ...], int] = field(default_factory=dict)
    tables: dict[PageTable, tuple[tuple[int, ...], int, list[int]]] = field(default_factory=dict)
    """token ids, number of shared pages, page ids"""
    now: int = 0

    def prefixes(self, token_ids: tuple[int, ...], num_pages: int) -> list[tuple[int, ...]]:
        return [token_ids[: (at + 1) * self.page_size] for at in range(num_pages)]

    def locked(self) -> set[tuple[int, ...]]:
        return {p for tokens, shared, _ in self.tables.values() for p in self.prefixes(tokens, shared)}

    def evictable(self) -> set[tuple[int, ...]]:
        return set(self.cached) - self.locked()

    def free(self) -> set[int]:
        private = {page for _, shared, pages in self.tables.values() for page in pages[shared:]}
        return set(range(self.num_pages)) - private - set(self.cached.values())

    def hit(self, token_ids: tuple[int, ...]) -> list[int]:
        pages: list[int] = []
        for prefix in self.prefixes(token_ids, (len(token_ids) - 1) // self.page_size):
            if prefix not in self.cached:
                break
            pages.append(self.cached[prefix])
        return pages

    def stamp(self, token_ids: tuple[int, ...], num_pages: int) -> None:
        self.now += 1
        self.last_used.update(dict.fromkeys(self.prefixes(token_ids, num_pages), self.now))

    def evict_one(self) -> None:
        """The page that ends the least recently used prefix which nothing extends."""
        extended = {prefix[: -self.page_size] for prefix in self.cached}
        candidates = {self.last_used[p]: p for p in self.evictable() if p not in extended}
        assert len(candidates) == len([p for p in self.evictable() if p not in extended]), "a tie in time"
        del self.cached[candidates[min(candidates)]]


class NaiveComparison:
    """The same random operations on a PageIndex and on NaivePages."""

    def __init__(self, rng: Random, *, enable_prefix_cache: bool) -> None:
        self.rng = rng
        self.enable = enable_prefix_cache
        self.page_size = rng.choice([1, 2, 3])
        self.index = PageIndex(rng.randint(4, 24), self.page_size, enable_prefix_cache=enable_prefix_cache)
        self.naive = NaivePages(self.index.num_pages_total, self.page_size)
        self.num_hits = self.num_evictions = self.num_refusals = 0

    def step(self) -> None:
        tables = list(self.naive.tables)
        roll = self.rng.random()
        if not tables or (roll < 0.3 and len(tables) < 5):
            self.begin()
        elif roll < 0.6:
            self.grow(self.rng.choice(tables))
        elif roll < 0.75:
            self.commit(self.rng.choice(tables))
        elif roll < 0.99:
            self.release(self.rng.choice(tables))
        else:
            num_evictable = len(self.naive.evictable())
            for prefix in self.naive.evictable():
                del self.naive.cached[prefix]
            assert self.index.flush() == num_evictable
        self.index.check()
        assert self.index.num_pages_free == len(self.naive.free())
        assert self.index.num_pages_cached == len(self.naive.evictable())

    def begin(self) -> None:
        tokens = tuple(self.rng.randrange(2) for _ in range(self.rng.randint(1, 8 * self.page_size)))
        use_cache = self.rng.random() < 0.9
        expected = self.naive.hit(tokens) if use_cache else []
        table = self.index.begin(tokens, use_cache=use_cache)
        assert table.page_ids == expected
        assert table.num_cached_tokens == len(expected) * self.page_size < len(tokens)
        self.num_hits += bool(expected)
        self.naive.tables[table] = (tokens, len(expected), list(expected))

    def grow(self, table: PageTable) -> None:
        tokens, _, pages = self.naive.tables[table]
        num_tokens = self.rng.randint(1, len(tokens))
        count = max(0, -(-num_tokens // self.page_size) - len(pages))
        missing = count - len(self.naive.free())
        if missing > len(self.naive.evictable()):
            self.num_refusals += 1
            assert self.index.grow(table, num_tokens) is None
            return
        for _ in range(missing):
            self.naive.evict_one()
            self.num_evictions += 1
        free = self.naive.free()
        new = self.index.grow(table, num_tokens)
        assert new is not None and len(new) == len(set(new)) == count and free.issuperset(new)
        pages.extend(new)

    def commit(self, table: PageTable) -> None:
        tokens, shared, pages = self.naive.tables[table]
        num_computed = self.rng.randint(0, min(len(tokens), len(pages) * self.page_size))
        full = num_computed // self.page_size
        self.index.commit(table, tokens, num_computed)
        if self.enable and full > shared and self.naive.prefixes(tokens, full)[shared] not in self.naive.cached:
            self.naive.cached.update(
                zip(self.naive.prefixes(tokens, full)[shared:], pages[shared:full], strict=True)
            )
            self.naive.stamp(tokens, full)
            self.naive.tables[table] = (tokens, full, pages)

    def release(self, table: PageTable) -> None:
        tokens, shared, pages = self.naive.tables.pop(table)
        num_computed = self.rng.randint(0, min(len(tokens), len(pages) * self.page_size))
        self.index.release(table, tokens, num_computed)
        full = max(shared, num_computed // self.page_size) if self.enable else shared
        for prefix, page_id in list(zip(self.naive.prefixes(tokens, full), pages, strict=False))[shared:]:
            self.naive.cached.setdefault(prefix, page_id)
        self.naive.stamp(tokens, full)


@pytest.mark.parametrize("enable_prefix_cache", [True, False])
def test_index_agrees_with_a_naive_account(enable_prefix_cache: bool) -> None:
    num_hits = num_evictions = num_refusals = 0
    for seed in range(NUM_RANDOM_OPERATIONS // 200):
        print(f"seed {seed}")
        comparison = NaiveComparison(Random(seed), enable_prefix_cache=enable_prefix_cache)
        for _ in range(200):
            comparison.step()
        num_hits += comparison.num_hits
        num_evictions += comparison.num_evictions
        num_refusals += comparison.num_refusals
    assert num_refusals > 50
    assert (num_hits > 50 and num_evictions > 50) == enable_prefix_cache


def _used_index() -> tuple[PageIndex, PageTable]:
    """Free pages, private pages, a locked prefix, and an evictable prefix."""
    index = PageIndex(12, page_size=2)
    for tokens in ((1, 2, 3, 4), (1, 2, 5, 6, 7, 8)):
        finished = index.begin(tokens)
        index.grow(finished, len(tokens))
        index.release(finished, tokens, len(tokens))
    table = index.begin((1, 2, 3, 4, 9, 9))
    index.grow(table, 6)
    index.check()
    assert index.num_pages_cached == 2 and table.num_shared_pages == 2
    return index, table


CORRUPTIONS: dict[str, Callable[[PageIndex, PageTable], object]] = {
    "page lost from the free list": lambda index, table: index._allocator.take(1),
    "page freed while in a table": lambda index, table: index._allocator.give_back(table.page_ids[-1:]),
    "cached page freed": lambda index, table: index._allocator.give_back(table.page_ids[:1]),
    "free list holds a page twice": lambda index, table: index._allocator._free.append(
        index._allocator._free[0]
    ),
    "page lost from a table": lambda index, table: table.page_ids.pop(),
    "page in a table twice": lambda index, table: table.page_ids.append(table.page_ids[-1]),
    "pages of a table swapped": lambda index, table: table.page_ids.reverse(),
    "shared page counted as private": lambda index, table: setattr(table, "num_shared_pages", 1),
    "slots miscounted": lambda index, table: setattr(table, "num_slots", table.num_slots + 1),
    "lock too many": lambda index, table: index._tree.lock(table.node),
    "lock missing": lambda index, table: index._tree.unlock(table.node),
    "lock on the wrong node": lambda index, table: setattr(table, "node", table.node.parent),
    "table forgotten": lambda index, table: index._tables.clear(),
    "locked page evicted": lambda index, table: index._tree._trim(table.node, 0),
    "evictable pages miscounted": lambda index, table: setattr(index._tree.device, "num_evictable_pages", 3),
    "cached pages miscounted": lambda index, table: setattr(index._tree.device, "num_pages", 3),
    "leaf not on offer": lambda index, table: index._tree.device.heap.clear(),
    "edge with a partial page": lambda index, table: setattr(
        table.node, "token_ids", table.node.token_ids[:-1]
    ),
    "edge under the wrong tokens": lambda index, table: setattr(table.node, "token_ids", (8, 8)),
    "child used later than its parent": lambda index, table: setattr(table.node, "last_used", 10**6),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_check_notices(corruption: str) -> None:
    index, table = _used_index()
    CORRUPTIONS[corruption](index, table)
    with pytest.raises(IntegrityError):
        index.check()


def test_table_cannot_be_released_twice() -> None:
    index, table = _used_index()
    index.release(table)
    with pytest.raises(IntegrityError, match="released twice"):
        index.release(table)
    index.check()
