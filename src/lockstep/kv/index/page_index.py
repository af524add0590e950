"""The only owner of pages: free ones, those of sequences, and cached ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lockstep.core.errors import IntegrityError
from lockstep.core.step import PageCopy
from lockstep.kv.index.allocator import PageAllocator
from lockstep.kv.index.host_pages import HostPages
from lockstep.kv.index.radix_tree import Node, RadixTree


class PageTable:
    """The pages of one sequence, in token order. Only PageIndex changes it.

    The first `num_shared_pages` belong to the prefix tree, which keeps them while this table lives (`node` is
    locked); the rest belong to this sequence alone. `num_cached_tokens` were cached when the table was made; the KV of
    the last ones may be on the host, and gets its pages when the table grows. `num_slots` tokens fit without growing.
    """

    __slots__ = ("node", "num_cached_tokens", "num_shared_pages", "num_slots", "page_ids")

    def __init__(self, node: Node, page_ids: list[int], num_on_host: int, page_size: int) -> None:
        self.node = node
        self.page_ids = page_ids
        self.num_shared_pages = len(page_ids)
        self.num_slots = len(page_ids) * page_size
        self.num_cached_tokens = self.num_slots + num_on_host * page_size


class PageIndex:
    """Page tables over one pool of `num_pages` pages of `page_size` tokens, sharing cached prefixes.

    A sequence's life: `begin`, then `grow` before a step and `commit` once it is sure to be computed, then `release`.
    Shared pages are always a prefix of a table and always full, so nobody writes to them but the steps that fill them.
    Without the prefix cache every page is private to its sequence, and everything else is the same. With
    `num_host_pages`, cached prefixes that must make room go to the host and come back when they are asked for;
    `take_copies` says what is to be copied for that.
    """

    def __init__(
        self, num_pages: int, page_size: int, *, enable_prefix_cache: bool = True, num_host_pages: int = 0
    ) -> None:
        self.page_size = page_size
        self._enable_prefix_cache = enable_prefix_cache
        self._allocator = PageAllocator(num_pages)
        self._host = HostPages(num_host_pages)
        self._tree = RadixTree(page_size, self._host if num_host_pages else None)
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
    def num_host_pages_total(self) -> int:
        """Pages of the host behind the device's."""
        return self._host.num_total

    @property
    def num_host_pages_cached(self) -> int:
        """Those that hold a prefix."""
        return self._host.num_total - self._host.num_free

    @property
    def num_host_cached_tokens(self) -> int:
        """Tokens whose KV came back from the host so far."""
        return self._host.num_loaded * self.page_size

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
        start = len(page_ids) * self.page_size
        node, host_ids = self._tree.match(token_ids, limit, start=start, below=node, tier=self._tree.on_host)
        self._tree.lock(node)
        table = PageTable(node, page_ids, len(host_ids), self.page_size)
        self._tables[table] = None
        return table

    def grow(self, table: PageTable, num_tokens: int) -> tuple[int, ...] | None:
        """Adds pages until `num_tokens` tokens fit, evicting cached prefixes if need be.

        What is cached on the host comes back first. Returns the new pages, or None (and changes nothing) when not
        enough are available.
        """
        awaited = range(len(table.page_ids), table.num_cached_tokens // self.page_size)
        on_host = self._tree.path_on_host(table.node) if awaited else []
        # Some of the awaited pages may have come back for another sequence, or been computed anew, meanwhile.
        num_back = len(awaited) - sum(len(node.page_ids) for node in on_host)
        count = max(-(-num_tokens // self.page_size), awaited.stop) - len(table.page_ids) - num_back
        if count <= 0 and not awaited:
            return ()
        missing = count - self._allocator.num_free
        if missing > self._tree.num_evictable_pages:
            return None
        if missing > 0:
            self._allocator.give_back(self._tree.evict(missing))
        taken = tuple(self._allocator.take(count))
        if awaited:
            taken = self._load(table, on_host, taken)
        table.page_ids.extend(taken)
        table.num_slots = len(table.page_ids) * self.page_size
        return taken

    def take_copies(self) -> tuple[PageCopy, ...]:
        """The copies between device and host that the next step begins with, in order. Given once."""
        return self._host.take_copies()

    def commit(self, table: PageTable, token_ids: Sequence[int], num_computed: int) -> None:
        """Shares the full pages among the first `num_computed` tokens of a living sequence.

        The caller sees to it that they are computed before a table that begins with them is read. When another
        sequence has cached the same tokens meanwhile, the pages stay private: a table's pages do not change under a
        running sequence.
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

    def withdraw(self, table: PageTable) -> None:
        """No table to come begins with what this one shares beyond its cached prefix; those that do already go on.

        A released table's pages are withdrawn as far as none of them has made room since.
        """
        self._tree.hide(table.node, table.num_cached_tokens // self.page_size)

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
            path = self._tree.path_pages(table.node)
            if table.num_slots < table.num_cached_tokens:
                path = path[: len(shared)]  # the rest is on the host as yet
            if shared != path:
                raise IntegrityError("a page table does not start with the cached prefix that it locks")
            if table.num_slots != len(table.page_ids) * self.page_size:
                raise IntegrityError("a page table counts slots that its pages do not have")
            owned += table.page_ids[table.num_shared_pages :]
        if sorted(owned) != list(range(self.num_pages_total)):
            wrong = {page_id: n for page_id, n in Counter(owned).items() if n > 1}
            lost = sorted(set(range(self.num_pages_total)) - set(owned))
            raise IntegrityError(f"pages without an owner: {lost}; pages with several (id: owners): {wrong}")

    def _load(self, table: PageTable, on_host: Sequence[Node], page_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Brings the rest of the cached prefix that the table locks back to the first of these pages.

        Returns the pages that the table gets: those of the rest of the prefix, then the ones left over.
        """
        for node in on_host:
            mine, page_ids = page_ids[: len(node.page_ids)], page_ids[len(node.page_ids) :]
            self._host.load(self._tree.adopt(node, mine), mine)
        shared = self._tree.path_pages(table.node)
        gained = shared[table.num_shared_pages :]
        table.num_shared_pages = len(shared)
        return (*gained, *page_ids)

    def _unshared(
        self, table: PageTable, token_ids: Sequence[int], num_computed: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The private full pages among the first `num_computed` tokens, as (token ids, page ids)."""
        start, stop = table.num_shared_pages, num_computed // self.page_size
        if not self._enable_prefix_cache or stop <= start:
            return (), ()
        tokens = tuple(token_ids[start * self.page_size : stop * self.page_size])
        return tokens, tuple(table.page_ids[start:stop])
