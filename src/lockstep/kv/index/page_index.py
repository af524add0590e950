"""The only owner of pages: free ones, those of sequences, and cached ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lockstep.core.errors import IntegrityError
from lockstep.kv.index.allocator import PageAllocator
from lockstep.kv.index.radix_tree import Node, RadixTree


class PageTable:
    """The pages of one sequence, in token order. Only PageIndex changes it.

    The first `num_shared_pages` belong to the prefix tree, which keeps them while this table lives (`node` is
    locked); the rest belong to this sequence alone. `num_cached_tokens` had KV when the table was made.
    `num_slots` tokens fit without growing.
    """

    __slots__ = ("node", "num_cached_tokens", "num_shared_pages", "num_slots", "page_ids")

    def __init__(self, node: Node, page_ids: list[int], page_size: int) -> None:
        self.node = node
        self.page_ids = page_ids
        self.num_shared_pages = len(page_ids)
        self.num_slots = len(page_ids) * page_size
        self.num_cached_tokens = self.num_slots


class PageIndex:
    """Page tables over one pool of `num_pages` pages of `page_size` tokens, sharing cached prefixes.

    A sequence's life: `begin`, then `grow` before and `commit` after a step, then `release`. Shared pages are
    always a prefix of a table and always full, so nobody writes to them. Without the prefix cache every page is
    private to its sequence, and everything else is the same.
    """

    def __init__(self, num_pages: int, page_size: int, *, enable_prefix_cache: bool = True) -> None:
        self.page_size = page_size
        self._enable_prefix_cache = enable_prefix_cache
        self._allocator = PageAllocator(num_pages)
        self._tree = RadixTree(page_size)
        self._tables: dict[PageTable, None] = {}

    @property
    def num_pages_total(self) -> int:
        return self._allocator.num_pages

    @property
    def num_pages_free(self) -> int:
        """Pages that hold nothing."""
        return self._allocator.num_free

    @property
    def num_pages_cached(self) -> int:
        """Pages that hold a prefix which no live sequence uses: evictable."""
        return self._tree.num_evictable_pages

    @property
    def num_pages_available(self) -> int:
        """Pages that `grow` can hand out, evicting if need be."""
        return self._allocator.num_free + self._tree.num_evictable_pages

    @property
    def num_pages_in_use(self) -> int:
        """Pages of live sequences; a shared page counts once."""
        return self.num_pages_total - self.num_pages_available

    @property
    def num_tables(self) -> int:
        """Live sequences."""
        return len(self._tables)

    def begin(self, token_ids: Sequence[int], *, use_cache: bool = True) -> PageTable:
        """A page table that starts with the longest cached prefix of `token_ids`, or empty.

        The hit never covers the last token: it is computed in any case, for its logits.
        """
        limit = len(token_ids) - 1 if use_cache else 0
        node, page_ids = self._tree.match(token_ids, limit)
        self._tree.lock(node)
        table = PageTable(node, page_ids, self.page_size)
        self._tables[table] = None
        return table

    def grow(self, table: PageTable, num_tokens: int) -> tuple[int, ...] | None:
        """Adds pages until `num_tokens` tokens fit, evicting cached prefixes if need be.

        Returns the new pages, or None (and changes nothing) when not enough are available.
        """
        count = -(-num_tokens // self.page_size) - len(table.page_ids)
        if count <= 0:
            return ()
        missing = count - self._allocator.num_free
        if missing > self._tree.num_evictable_pages:
            return None
        if missing > 0:
            self._allocator.give_back(self._tree.evict(missing))
        new_page_ids = self._allocator.take(count)
        table.page_ids.extend(new_page_ids)
        table.num_slots = len(table.page_ids) * self.page_size
        return tuple(new_page_ids)

    def commit(self, table: PageTable, token_ids: Sequence[int], num_computed: int) -> None:
        """Shares the full pages among the first `num_computed` tokens of a living sequence.

        When another sequence has cached the same tokens meanwhile, the pages stay private: a table's pages do
        not change under a running sequence.
        """
        new_token_ids, new_page_ids = self._unshared(table, token_ids, num_computed)
        if not new_page_ids:
            return
        leaf = self._tree.append(table.node, new_token_ids, new_page_ids)
        if leaf is None:
            return
        self._tree.lock(leaf)
        self._tree.unlock(table.node)
        table.node = leaf
        table.num_shared_pages += len(new_page_ids)

    def release(self, table: PageTable, token_ids: Sequence[int] = (), num_computed: int = 0) -> None:
        """Ends a table: the full pages among the first `num_computed` tokens stay cached, all others are freed.

        Without tokens nothing more is cached than `commit` already did. Raises IntegrityError for a dead table.
        """
        if table not in self._tables:
            raise IntegrityError("a page table was released twice")
        del self._tables[table]
        self._tree.unlock(table.node)
        private = table.page_ids[table.num_shared_pages :]
        new_token_ids, new_page_ids = self._unshared(table, token_ids, num_computed)
        if new_page_ids:
            _, duplicates = self._tree.insert(new_token_ids, new_page_ids, below=table.node)
            private = [*duplicates, *private[len(new_page_ids) :]]
        self._allocator.give_back(private)

    def flush(self) -> int:
        """Forgets every cached prefix that no live sequence uses; returns the number of pages freed."""
        page_ids = self._tree.flush()
        self._allocator.give_back(page_ids)
        return len(page_ids)

    def check(self) -> None:
        """Raises IntegrityError unless each page has exactly one owner and locks, tables and totals agree."""
        cached = self._tree.check(Counter(table.node for table in self._tables))
        owned = self._allocator.check() + cached
        for table in self._tables:
            shared = table.page_ids[: table.num_shared_pages]
            if shared != self._tree.path_pages(table.node):
                raise IntegrityError("a page table does not start with the cached prefix that it locks")
            if table.num_slots != len(table.page_ids) * self.page_size:
                raise IntegrityError("a page table counts slots that its pages do not have")
            owned += table.page_ids[table.num_shared_pages :]
        if sorted(owned) != list(range(self.num_pages_total)):
            wrong = {page_id: n for page_id, n in Counter(owned).items() if n > 1}
            lost = sorted(set(range(self.num_pages_total)) - set(owned))
            raise IntegrityError(f"pages without an owner: {lost}; pages with several (id: owners): {wrong}")

    def _unshared(
        self, table: PageTable, token_ids: Sequence[int], num_computed: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The private full pages among the first `num_computed` tokens, as (token ids, page ids)."""
        start, stop = table.num_shared_pages, num_computed // self.page_size
        if not self._enable_prefix_cache or stop <= start:
            return (), ()
        tokens = tuple(token_ids[start * self.page_size : stop * self.page_size])
        return tokens, tuple(table.page_ids[start:stop])
