"""A radix tree over whole pages: which prefixes of tokens have KV, and in which pages of the device or of the host.

An edge holds one or more pages and is stored with the node at its lower end. Edges split at page borders only.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence

from lockstep.core.errors import IntegrityError
from lockstep.kv.index.host_pages import HostPages


class Tier:
    """One place where cached pages lie: how many there are, how many of them nobody locks, and which leaf goes first.

    A leaf of a tier is a node with no child in the same tier. Entries of the heap are not removed but grow stale.
    """

    __slots__ = ("heap", "num_evictable_pages", "num_pages")

    def __init__(self) -> None:
        self.num_pages = 0
        self.num_evictable_pages = 0
        self.heap: list[tuple[int, int, Node]] = []
        """(last_used, serial, node)"""

    def add(self, num_pages: int, *, locked: bool) -> None:
        self.num_pages += num_pages
        self.num_evictable_pages += 0 if locked else num_pages

    def offer(self, node: Node, num_nodes: int) -> None:
        """Puts the node up for eviction if it is an unlocked leaf."""
        if not self.is_current(node, node.last_used):
            return
        if len(self.heap) > 2 * num_nodes + 16:
            self.heap = [entry for entry in self.heap if self.is_current(entry[2], entry[0])]
            heapq.heapify(self.heap)
        heapq.heappush(self.heap, (node.last_used, node.serial, node))

    def first(self) -> Node | None:
        """The unlocked leaf that was not used for the longest time."""
        while self.heap:
            last_used, _, node = self.heap[0]
            if self.is_current(node, last_used):
                return node
            heapq.heappop(self.heap)
        return None

    def is_current(self, node: Node, last_used: int) -> bool:
        """Whether an entry of the heap still names an unlocked leaf, last used when the entry was made."""
        return (
            not node.num_children_in_tier
            and not node.num_locks
            and node.last_used == last_used
            and node.tier is self
            and node.parent is not None
        )


class Node:
    """The lower end of an edge: `page_ids` in its tier, and the `token_ids` written in them.

    `num_locks` counts the locks on this node and below it, so a node without locks has none below either.
    `last_used` is a logical time. A node keeps its identity when its edge is split: the upper part is new. What is
    below a node on the host is there too; a leaf of the device may have such children, which its tier does not count.
    """

    __slots__ = (
        "children",
        "last_used",
        "num_children_in_tier",
        "num_locks",
        "page_ids",
        "parent",
        "serial",
        "tier",
        "token_ids",
    )

    def __init__(
        self,
        parent: Node | None,
        tier: Tier,
        token_ids: tuple[int, ...],
        page_ids: tuple[int, ...],
        serial: int,
    ) -> None:
        self.parent = parent
        self.tier = tier
        self.token_ids = token_ids
        self.page_ids = page_ids
        self.serial = serial
        self.children: dict[tuple[int, ...], Node] = {}
        self.num_children_in_tier = 0
        self.num_locks = 0
        self.last_used = 0


class RadixTree:
    """Prefixes of whole pages, with locks, and least-recently-used eviction of what nobody locks.

    With `host` pages behind the device's, what is evicted from the device goes there, and is forgotten only when there
    is no more room. Time is a counter that moves at each use, so eviction is deterministic. No two leaves of a tier
    share a time: one use stamps one path, and a path has one leaf in each.
    """

    def __init__(self, page_size: int, host: HostPages | None = None) -> None:
        self.page_size = page_size
        self.device = Tier()
        self.on_host = Tier()
        self.root = Node(None, self.device, (), (), 0)
        self._host = host
        self._num_nodes = 0
        self._last_serial = 0
        self._now = 0

    @property
    def num_pages(self) -> int:
        """Cached pages on the device."""
        return self.device.num_pages

    @property
    def num_evictable_pages(self) -> int:
        """Those that nobody locks."""
        return self.device.num_evictable_pages

    def match(
        self,
        token_ids: Sequence[int],
        limit: int,
        *,
        start: int = 0,
        below: Node | None = None,
        tier: Tier | None = None,
    ) -> tuple[Node, list[int]]:
        """The longest cached run of token_ids[start:limit], in whole pages, under `below` (default: the root).

        Looks in one tier, the device unless told otherwise. Returns the node where the run ends, splitting an edge if
        need be, and its pages in order.
        """
        node, tier = below or self.root, tier or self.device
        page_ids: list[int] = []
        while start + self.page_size <= limit:
            child = node.children.get(tuple(token_ids[start : start + self.page_size]))
            if child is None or child.tier is not tier:
                break
            num_shared = self._num_shared_pages(child, token_ids, start, limit)
            node = child if num_shared == len(child.page_ids) else self._split(child, num_shared)
            page_ids.extend(node.page_ids)
            start += num_shared * self.page_size
        return node, page_ids

    def append(self, parent: Node, token_ids: tuple[int, ...], page_ids: tuple[int, ...]) -> Node | None:
        """Whole pages below `parent`, computed by a step; None when the first of them is already cached there.

        Returns where they end: a new leaf, or a node that had them on the host and has them on the device now.
        """
        child = parent.children.get(token_ids[: self.page_size])
        if child is not None and child.tier is self.device:
            return None
        end, known = self.match(token_ids, len(token_ids), below=parent, tier=self.on_host)
        if known:
            assert self._host is not None
            taken = page_ids[: len(known)]
            for node in self.path_on_host(end):
                self._host.forget(self.adopt(node, taken[: len(node.page_ids)]))
                taken = taken[len(node.page_ids) :]
        rest = page_ids[len(known) :]
        if rest:
            end = self._add_leaf(end, token_ids[len(known) * self.page_size :], rest)
        self.touch(end)
        return end

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

    def hide(self, node: Node, num_kept: int) -> None:
        """No tokens match more than the first `num_kept` pages of the path to `node`, where an edge ends, any more.

        What follows them stays with those who lock it, and goes when its turn comes.
        """
        for step in reversed(list(_path_up(node))):
            if num_kept == 0:
                self._rename(step)
                return
            num_kept -= len(step.page_ids)

    def path_on_host(self, node: Node) -> list[Node]:
        """The nodes from the device's part of the path to `node`, which are on the host, downwards."""
        return [step for step in _path_up(node) if step.tier is self.on_host][::-1]

    def adopt(self, node: Node, page_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Gives a node on the host, right below the device's part, pages of the device; returns those it had."""
        parent = node.parent
        if parent is None or node.tier is not self.on_host or parent.tier is not self.device:
            raise IntegrityError(
                "only a node on the host, below one on the device, can be given the device's pages"
            )
        had = self._move(node, self.device, page_ids)
        parent.num_children_in_tier += 1
        node.num_children_in_tier = 0
        self._offer(node)
        return had

    def lock(self, node: Node) -> None:
        """Keeps the path to `node` from eviction until the matching `unlock`."""
        for step in _path_up(node):
            if step.num_locks == 0:
                step.tier.num_evictable_pages -= len(step.page_ids)
            step.num_locks += 1

    def unlock(self, node: Node) -> None:
        """Undoes one `lock` and marks the path as just used."""
        for step in _path_up(node):
            if step.num_locks == 0:
                raise IntegrityError("a node of the prefix tree was unlocked more often than locked")
            step.num_locks -= 1
            if step.num_locks == 0:
                step.tier.num_evictable_pages += len(step.page_ids)
        self.touch(node)

    def touch(self, node: Node) -> None:
        """Marks the path to `node` as just used."""
        self._now += 1
        for step in _path_up(node):
            step.last_used = self._now
            self._offer(step)

    def evict(self, count: int) -> list[int]:
        """Frees up to `count` unlocked pages of the device, least recently used prefix first; returns their ids.

        An edge loses its last pages first, so what remains of a prefix stays usable.
        """
        freed: list[int] = []
        while len(freed) < count and (leaf := self.device.first()) is not None:
            keep = max(0, len(leaf.page_ids) - (count - len(freed)))
            moving = leaf.page_ids[keep:]
            freed.extend(reversed(moving))
            if self._host is not None and self._has_room(len(moving)):
                self._save(leaf, keep)
            else:
                self._trim(leaf, keep)
        return freed

    def flush(self) -> list[int]:
        """Forgets every unlocked page, on the host too, and returns the ids of the device's."""
        self._evict_from_host(self.on_host.num_evictable_pages)
        freed: list[int] = []
        while (leaf := self.device.first()) is not None:
            freed.extend(reversed(leaf.page_ids))
            self._trim(leaf, 0)
        return freed

    def path_pages(self, node: Node) -> list[int]:
        """The pages from the root to the end of `node`, in order."""
        return [page_id for step in reversed(list(_path_up(node))) for page_id in step.page_ids]

    def check(self, locks: Mapping[Node, int]) -> list[int]:
        """The cached page ids of the device. `locks` says how often each node was locked directly.

        Raises IntegrityError when shape, tokens, locks, times, tiers or totals contradict each other.
        """
        nodes = list(self._nodes())
        num_locks = {node: locks.get(node, 0) for node in nodes}
        for node in reversed(nodes):
            self._check_node(node, num_locks[node])
            if node.parent in num_locks:
                num_locks[node.parent] += num_locks[node]
        if any(count for node, count in locks.items() if node is not self.root and node not in num_locks):
            raise IntegrityError("a locked node is not in the prefix tree")
        for tier in (self.device, self.on_host):
            self._check_tier(tier, [node for node in nodes if node.tier is tier])
        if len(nodes) != self._num_nodes:
            raise IntegrityError(f"the prefix tree has {len(nodes)} nodes, but counts {self._num_nodes}")
        if self._host is not None:
            self._host.check(
                [page_id for node in nodes if node.tier is self.on_host for page_id in node.page_ids]
            )
        return [page_id for node in nodes if node.tier is self.device for page_id in node.page_ids]

    def _check_tier(self, tier: Tier, nodes: list[Node]) -> None:
        num_pages = sum(len(node.page_ids) for node in nodes)
        num_evictable = sum(len(node.page_ids) for node in nodes if not node.num_locks)
        if (num_pages, num_evictable) != (tier.num_pages, tier.num_evictable_pages):
            raise IntegrityError(
                f"the prefix tree holds (pages, evictable) {(num_pages, num_evictable)} in a tier, but counts otherwise"
            )
        offered = {node for last_used, _, node in tier.heap if tier.is_current(node, last_used)}
        if offered != {node for node in nodes if not node.num_children_in_tier and not node.num_locks}:
            raise IntegrityError("the leaves on offer for eviction are not the unlocked leaves")

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
        if node.tier is self.device and parent.tier is not self.device:
            raise IntegrityError("a prefix is on the device, but one that it needs is not")
        if node.num_children_in_tier != sum(child.tier is node.tier for child in node.children.values()):
            raise IntegrityError("a node of the prefix tree counts other children than it has")

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
        upper = self._new_node(node.parent, node.tier, node.token_ids[:cut], node.page_ids[:num_pages])
        upper.num_locks = node.num_locks
        upper.last_used = node.last_used
        upper.num_children_in_tier = 1
        node.parent.children[node.token_ids[: self.page_size]] = upper
        node.parent = upper
        node.token_ids = node.token_ids[cut:]
        node.page_ids = node.page_ids[num_pages:]
        upper.children[node.token_ids[: self.page_size]] = node
        return upper

    def _rename(self, node: Node) -> None:
        """Gives the first page of the node's edge the node's number, which is no token's, for tokens."""
        parent, size = node.parent, self.page_size
        assert parent is not None
        del parent.children[node.token_ids[:size]]
        node.token_ids = (-node.serial,) * size + node.token_ids[size:]
        parent.children[node.token_ids[:size]] = node

    def _new_node(
        self, parent: Node, tier: Tier, token_ids: tuple[int, ...], page_ids: tuple[int, ...]
    ) -> Node:
        self._num_nodes += 1
        self._last_serial += 1
        return Node(parent, tier, token_ids, page_ids, self._last_serial)

    def _add_leaf(self, parent: Node, token_ids: tuple[int, ...], page_ids: tuple[int, ...]) -> Node:
        leaf = self._new_node(parent, self.device, token_ids, page_ids)
        parent.children[token_ids[: self.page_size]] = leaf
        parent.num_children_in_tier += 1
        self.device.add(len(page_ids), locked=False)
        return leaf

    def _has_room(self, count: int) -> bool:
        """Makes room for `count` more pages on the host, as far as nobody locks what is there."""
        assert self._host is not None
        self._evict_from_host(count - self._host.num_free)
        return count <= self._host.num_free

    def _evict_from_host(self, count: int) -> None:
        """Forgets up to `count` unlocked pages of the host."""
        while count > 0 and (leaf := self.on_host.first()) is not None:
            assert self._host is not None
            keep = max(0, len(leaf.page_ids) - count)
            count -= len(leaf.page_ids) - keep
            self._host.forget(leaf.page_ids[keep:])
            self._trim(leaf, keep)

    def _save(self, leaf: Node, keep: int) -> None:
        """Moves the pages of a leaf of the device, but for the first `keep`, to the host."""
        assert self._host is not None
        if keep:
            self._split(leaf, keep)
        parent = leaf.parent
        assert parent is not None
        self._move(leaf, self.on_host, self._host.save(leaf.page_ids))
        parent.num_children_in_tier -= 1
        leaf.num_children_in_tier = len(leaf.children)
        self._offer(leaf)
        self._offer(parent)

    def _move(self, node: Node, tier: Tier, page_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Gives the node pages of another tier; returns those that it had."""
        had, locked = node.page_ids, bool(node.num_locks)
        node.tier.add(-len(had), locked=locked)
        tier.add(len(page_ids), locked=locked)
        node.tier, node.page_ids = tier, page_ids
        return had

    def _trim(self, leaf: Node, keep: int) -> None:
        """Forgets the pages of an unlocked node without children, but for the first `keep`."""
        leaf.tier.add(keep - len(leaf.page_ids), locked=False)
        if keep:
            leaf.page_ids = leaf.page_ids[:keep]
            leaf.token_ids = leaf.token_ids[: keep * self.page_size]
            return
        parent = leaf.parent
        assert parent is not None
        del parent.children[leaf.token_ids[: self.page_size]]
        parent.num_children_in_tier -= leaf.tier is parent.tier
        leaf.parent = None
        self._num_nodes -= 1
        self._offer(parent)

    def _offer(self, node: Node) -> None:
        node.tier.offer(node, self._num_nodes)

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
