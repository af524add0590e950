"""Who is where: each unfinished sequence is waiting, held behind its first sibling, or running."""

from __future__ import annotations

from lockstep.core.errors import IntegrityError, InvalidRequest, QueueFull
from lockstep.kv.index.page_index import PageIndex
from lockstep.scheduler.limits import SchedulerLimits
from lockstep.scheduler.ranked import Ranked
from lockstep.scheduler.sequence import RequestGroup, Sequence


class Roster:
    """Moves sequences between their places, with their pages.

    `departed` are the ids of sequences that left the running ones since the executor was last told.
    """

    def __init__(self, limits: SchedulerLimits, pages: PageIndex) -> None:
        self.waiting = Ranked("waiting")
        self.running = Ranked("running")
        self._limits = limits
        self._pages = pages
        self._groups: dict[str, RequestGroup] = {}
        self._departed: list[int] = []
        self._num_admissions = 0
        self._num_queued_requests = 0

    @property
    def num_requests(self) -> int:
        return len(self._groups)

    @property
    def num_waiting(self) -> int:
        """Sequences that do not run, held ones included."""
        return len(self.waiting) + sum(len(group.held) for group in self._groups.values())

    def group(self, request_id: str) -> RequestGroup | None:
        """The unfinished request of that id."""
        return self._groups.get(request_id)

    def require_room(self, request_id: str) -> None:
        """Raises QueueFull, or InvalidRequest when the id is in use."""
        if request_id in self._groups:
            raise InvalidRequest(
                f"request id {request_id!r} is in use; give each request its own",
                param="request_id",
                code="duplicate",
            )
        if self._num_queued_requests >= self._limits.max_queued_requests:
            raise QueueFull(f"{self._num_queued_requests} requests are waiting already; try again later")

    def enqueue(self, group: RequestGroup) -> None:
        self._groups[group.request.request_id] = group
        self._num_queued_requests += 1
        self.waiting.add(group.unfinished[0])

    def unhold(self, group: RequestGroup) -> None:
        """The siblings of the first sequence join the queue, in the place of their arrival."""
        for sibling in group.unhold():
            self.waiting.add(sibling)

    def start_first(self) -> None:
        """The first of the queue, which has its pages, runs."""
        sequence = self.waiting.pop(0)
        self._uncount(sequence)
        self._num_admissions += 1
        sequence.rank = (sequence.priority, 0, self._num_admissions)
        self.running.add(sequence)

    def preempt_worst(self) -> None:
        """The running sequence of the worst rank gives up its pages and waits to be computed again.

        Its tokens in flight still count. What it computed stays in the prefix cache until the pages are needed,
        so often little is computed twice.
        """
        sequence = self.running[-1]
        self._stop_running(sequence, keep=True)
        self.waiting.add(sequence)

    def discard(self, sequence: Sequence, *, keep: bool) -> None:
        """The sequence has ended. `keep` says whether its computed pages may serve others."""
        group = sequence.group
        sequence.ended = True
        if sequence.table is not None:
            self._stop_running(sequence, keep=keep)
        elif sequence in group.held:
            group.held.remove(sequence)
        else:
            self.waiting.remove(sequence)
            self._uncount(sequence)
        del group.unfinished[sequence.index]
        if not group.unfinished:
            del self._groups[group.request.request_id]

    def take_departed(self) -> tuple[int, ...]:
        """Sequences that the executor still knows but must forget."""
        departed, self._departed = tuple(self._departed), []
        return departed

    def check(self) -> None:
        """Raises IntegrityError when a sequence is nowhere, in two places, or in a wrong state for it."""
        self.waiting.check()
        self.running.check()
        self._pages.check()
        held = [sequence for group in self._groups.values() for sequence in group.held]
        placed = sorted(sequence.seq_id for sequence in [*self.waiting, *self.running, *held])
        unfinished = [sequence for group in self._groups.values() for sequence in group.unfinished.values()]
        if placed != sorted(sequence.seq_id for sequence in unfinished):
            raise IntegrityError("an unfinished sequence is nowhere or in two places, or an ended one remains")
        if any(sequence.table is not None for sequence in [*self.waiting, *held]):
            raise IntegrityError("a waiting sequence holds pages")
        if (
            len(self.running) != self._pages.num_tables
            or len(self.running) > self._limits.max_running_sequences
        ):
            raise IntegrityError("the running sequences are too many, or are not those with pages")
        for sequence in self.running:
            _check_running(sequence, self._limits.page_size)
        num_queued = sum(sequence.is_new and sequence.index == 0 for sequence in self.waiting)
        if num_queued != self._num_queued_requests:
            raise IntegrityError(
                f"{num_queued} requests are queued, but {self._num_queued_requests} are counted"
            )

    def _stop_running(self, sequence: Sequence, *, keep: bool) -> None:
        table = sequence.table
        assert table is not None
        self.running.remove(sequence)
        # Steps in flight may still write to these pages; whoever gets them writes and reads in later steps.
        self._pages.release(table, sequence.token_ids if keep else (), sequence.num_landed if keep else 0)
        sequence.table = None
        sequence.num_computed = sequence.num_landed = 0
        self._departed.append(sequence.seq_id)

    def _uncount(self, sequence: Sequence) -> None:
        if sequence.is_new and sequence.index == 0:
            self._num_queued_requests -= 1


def _check_running(sequence: Sequence, page_size: int) -> None:
    table = sequence.table
    if table is None:
        raise IntegrityError(f"running sequence {sequence.seq_id} has no pages")
    if not table.num_cached_tokens <= sequence.num_landed <= sequence.num_computed <= table.num_slots:
        raise IntegrityError(f"running sequence {sequence.seq_id} computed more tokens than it has slots")
    if table.num_shared_pages * page_size > sequence.num_computed:
        raise IntegrityError(
            f"running sequence {sequence.seq_id} shares pages that nobody was asked to compute"
        )
    if sequence.num_landed > len(sequence.token_ids):
        raise IntegrityError(f"running sequence {sequence.seq_id} counts tokens as computed that nobody knows")
    if len(sequence.token_ids) >= sequence.max_tokens or sequence.num_tokens > sequence.max_tokens:
        raise IntegrityError(f"running sequence {sequence.seq_id} goes on after its last token")
