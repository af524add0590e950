"""A radix tree over whole pages: which prefixes of tokens have KV, and in which pages.

An edge holds one or more pages and is stored with the node at its lower end. Edges split at page borders only.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence

from lockstep.core.errors import IntegrityError


class Node:
    """The lower end of an edge: `page_ids` and the `token_ids` written in them.

    `num_locks` counts the locks on this node and below it, so a node without locks has none below either.
    `last_used` is a logical time. A node keeps its identity when its edge is split: the upper part is new.
    """

    __slots__ = ("children", "last_used", "num_locks", "page_ids", "parent", "serial", "token_ids")

    def __init__(
        self, parent: Node | None, token_ids: tuple[int, ...], page_ids: tuple[int, ...], serial: int
    ) -> None:
        self.parent = parent
        self.token_ids = token_ids
        self.page_ids = page_ids
        self.serial = serial
        self.children: dict[tuple[int, ...], Node] = {}
        self.num_locks = 0
        self.last_used = 0


class RadixTree:
    """Prefixes of whole pages, with locks, and least-recently-used eviction of what nobody locks.

    Time is a counter that moves at each use, so eviction is deterministic. No two leaves share a time: one use
    stamps one path, and a path has one leaf.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.root = Node(None, (), (), 0)
        self.num_pages = 0
        self.num_evictable_pages = 0
        self._num_nodes = 0
        self._last_serial = 0
        self._now = 0
        self._leaves: list[tuple[int, int, Node]] = []
        """A heap of (last_used, serial, node). Entries are not removed but grow stale; see `_is_current`."""

    def match(
        self, token_ids: Sequence[int], limit: int, *, start: int = 0, below: Node | None = None
    ) -> tuple[Node, list[int]]:
        """The longest cached run of token_ids[start:limit], in whole pages, under `below` (default: the root).

        Returns the node where it ends, splitting an edge if need be, and its pages in order.
        """
        node = below or self.root
        page_ids: list[int] = []
        while start + self.page_size <= limit:
            child = node.children.get(tuple(token_ids[start : start + self.page_size]))
            if child is None:
                break
            num_shared = self._num_shared_pages(child, token_ids, start, limit)
            node = child if num_shared == len(child.page_ids) else self._split(child, num_shared)
            page_ids.extend(node.page_ids)
            start += num_shared * self.page_size
        return node, page_ids

    def append(self, parent: Node, token_ids: tuple[int, ...], page_ids: tuple[int, ...]) -> Node | None:
        """A new leaf of whole pages under `parent`; None when the first of them is already cached there."""
        first_page = token_ids[: self.page_size]
        if first_page in parent.children:
            return None
        leaf = self._new_node(parent, token_ids, page_ids)
        parent.children[first_page] = leaf
        self.num_pages += len(page_ids)
        self.num_evictable_pages += len(page_ids)
        self.touch(leaf)
        return leaf

    def insert(
        self, token_ids: tuple[int, ...], page_ids: tuple[int, ...], *, below: Node | None = None
    ) -> tuple[Node, tuple[int, ...]]:
        """Caches whole pages under `below` (the root by default).

        Returns the node where they end and the pages that the tree did not take, because it already holds
        others with the same tokens: those stay the caller's, to free. A cached page must not be given again.
        """
        parent, cached = self.match(token_ids, len(token_ids), below=below)
        num_cached = len(cached)
        rest = page_ids[num_cached:]
        leaf = self.append(parent, token_ids[num_cached * self.page_size :], rest) if rest else None
        if leaf is None:
            self.touch(parent)
        return leaf or parent, page_ids[:num_cached]

    def lock(self, node: Node) -> None:
        """Keeps the path to `node` from eviction until the matching `unlock`."""
        for step in _path_up(node):
            if step.num_locks == 0:
                self.num_evictable_pages -= len(step.page_ids)
            step.num_locks += 1

    def unlock(self, node: Node) -> None:
        """Undoes one `lock` and marks the path as just used."""
        for step in _path_up(node):
            if step.num_locks == 0:
                raise IntegrityError("a node of the prefix tree was unlocked more often than locked")
            step.num_locks -= 1
            if step.num_locks == 0:
                self.num_evictable_pages += len(step.page_ids)
        self.touch(node)

    def touch(self, node: Node) -> None:
        """Marks the path to `node` as just used."""
        self._now += 1
        for step in _path_up(node):
            step.last_used = self._now
        self._offer(node)

    def evict(self, count: int) -> list[int]:
        """Forgets up to `count` unlocked pages, least recently used prefix first, and returns their ids.

        An edge loses its last pages first, so what remains of a prefix stays usable.
        """
        freed: list[int] = []
        while len(freed) < count and self._leaves:
            last_used, _, leaf = self._leaves[0]
            if not self._is_current(leaf, last_used):
                heapq.heappop(self._leaves)
                continue
            keep = max(0, len(leaf.page_ids) - (count - len(freed)))
            freed.extend(reversed(leaf.page_ids[keep:]))
            if keep:
                leaf.page_ids = leaf.page_ids[:keep]
                leaf.token_ids = leaf.token_ids[: keep * self.page_size]
            else:
                heapq.heappop(self._leaves)
                self._remove(leaf)
        self.num_pages -= len(freed)
        self.num_evictable_pages -= len(freed)
        return freed

    def flush(self) -> list[int]:
        """Forgets every unlocked page and returns their ids."""
        return self.evict(self.num_evictable_pages)

    def path_pages(self, node: Node) -> list[int]:
        """The pages from the root to the end of `node`, in order."""
        return [page_id for step in reversed(list(_path_up(node))) for page_id in step.page_ids]

    def check(self, locks: Mapping[Node, int]) -> list[int]:
        """The cached page ids. `locks` says how often each node was locked directly.

        Raises IntegrityError when shape, tokens, locks, times or totals contradict each other.
        """
        nodes = list(self._nodes())
        num_locks = {node: locks.get(node, 0) for node in nodes}
        for node in reversed(nodes):
            self._check_node(node, num_locks[node])
            if node.parent in num_locks:
                num_locks[node.parent] += num_locks[node]
        if any(count for node, count in locks.items() if node is not self.root and node not in num_locks):
            raise IntegrityError("a locked node is not in the prefix tree")
        page_ids = [page_id for node in nodes for page_id in node.page_ids]
        num_evictable = sum(len(node.page_ids) for node in nodes if not node.num_locks)
        totals = (len(nodes), len(page_ids), num_evictable)
        if totals != (self._num_nodes, self.num_pages, self.num_evictable_pages):
            raise IntegrityError(
                f"the prefix tree holds (nodes, pages, evictable) {totals}, but counts otherwise"
            )
        offered = {node for last_used, _, node in self._leaves if self._is_current(node, last_used)}
        if offered != {node for node in nodes if not node.children and not node.num_locks}:
            raise IntegrityError("the leaves on offer for eviction are not the unlocked leaves")
        return page_ids

    def _check_node(self, node: Node, num_locks: int) -> None:
        parent = node.parent
        if not node.page_ids or len(node.token_ids) != len(node.page_ids) * self.page_size:
            raise IntegrityError("an edge of the prefix tree is empty or holds a partial page")
        if parent is None or parent.children.get(node.token_ids[: self.page_size]) is not node:
            raise IntegrityError("a node of the prefix tree is not where its first page says")
        if node.num_locks != num_locks:
            raise IntegrityError(
                f"a node of the prefix tree counts {node.num_locks} locks, but has {num_locks}"
            )
        if parent is not self.root and parent.last_used < node.last_used:
            raise IntegrityError("a prefix was used later than the prefix that contains it")

    def _num_shared_pages(self, node: Node, token_ids: Sequence[int], start: int, limit: int) -> int:
        """How many pages of the node's edge equal the tokens from `start`; at least the first does."""
        size = self.page_size
        edge = node.token_ids
        if start + len(edge) <= limit and tuple(token_ids[start : start + len(edge)]) == edge:
            return len(node.page_ids)
        at = size
        while at < len(edge) and start + at + size <= limit:
            if tuple(token_ids[start + at : start + at + size]) != edge[at : at + size]:
                break
            at += size
        return at // size

    def _split(self, node: Node, num_pages: int) -> Node:
        """Cuts the node's edge after `num_pages`; returns the new upper node."""
        assert node.parent is not None
        cut = num_pages * self.page_size
        upper = self._new_node(node.parent, node.token_ids[:cut], node.page_ids[:num_pages])
        upper.num_locks = node.num_locks
        upper.last_used = node.last_used
        node.parent.children[node.token_ids[: self.page_size]] = upper
        node.parent = upper
        node.token_ids = node.token_ids[cut:]
        node.page_ids = node.page_ids[num_pages:]
        upper.children[node.token_ids[: self.page_size]] = node
        return upper

    def _new_node(self, parent: Node, token_ids: tuple[int, ...], page_ids: tuple[int, ...]) -> Node:
        self._num_nodes += 1
        self._last_serial += 1
        return Node(parent, token_ids, page_ids, self._last_serial)

    def _remove(self, leaf: Node) -> None:
        parent = leaf.parent
        assert parent is not None
        del parent.children[leaf.token_ids[: self.page_size]]
        leaf.parent = None
        self._num_nodes -= 1
        self._offer(parent)

    def _offer(self, node: Node) -> None:
        """Puts the node up for eviction if it is an unlocked leaf."""
        if not self._is_current(node, node.last_used):
            return
        if len(self._leaves) > 2 * self._num_nodes + 16:
            self._leaves = [entry for entry in self._leaves if self._is_current(entry[2], entry[0])]
            heapq.heapify(self._leaves)
        heapq.heappush(self._leaves, (node.last_used, node.serial, node))

    def _is_current(self, node: Node, last_used: int) -> bool:
        """Whether an entry of the heap still names an unlocked leaf, last used when the entry was made."""
        return (
            node.parent is not None and not node.children and not node.num_locks and node.last_used == last_used
        )

    def _nodes(self) -> Iterator[Node]:
        """Every node but the root, parents before children."""
        pending = list(self.root.children.values())
        while pending:
            node = pending.pop()
            yield node
            pending.extend(node.children.values())


def _path_up(node: Node) -> Iterator[Node]:
    """The nodes from `node` up to, not including, the root."""
    while node.parent is not None:
        yield node
        node = node.parent
