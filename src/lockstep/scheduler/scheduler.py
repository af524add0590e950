"""From requests to steps: StepPlan out, StepResult in, SequenceEvents out.

One rule covers prompts, chunks, decode and recompute: a sequence owes the tokens that it knows but has not
computed, and a step computes some of what is owed.

Up to `max_plans_in_flight` plans await their results, which come in the order of the plans. What a plan computes
counts as computed once it is planned, and each sequence that it samples owes one more token, whose id its result
brings. A sequence whose result says that it has ended may be in a later plan already: that row is discarded. Pages are
free for others at once, for steps run one after the other. Requests may come and be aborted at any time.

Full pages of a prompt are shared once they are planned: who is admitted later, even to the same plan, starts from them.
For steps run in order, and within one every layer stores the keys and values of all rows before any row attends. But in
a step of single tokens each row may store its own and attend at once, so no row may read what another one stores: a
page that a slice of one token fills is shared from the next plan on. What becomes of the writer changes nothing, since
its step runs anyway: aborted or preempted, it leaves pages that hold what their tokens say. So it does after an error,
which is about scores or a grammar; but numbers that went bad may have gone bad in its pages. What a sequence computed
until it failed is withdrawn, so that nobody starts from it any more and a next try computes it anew. Those who had
started from it go on: bad numbers would show in their scores too. Generated tokens are cached when their sequence
leaves, as far as their results have come.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import asdict, dataclass
from itertools import islice

from lockstep.core.errors import IntegrityError
from lockstep.core.output import EngineStats
from lockstep.core.request import FinishReason, Request
from lockstep.core.step import SequenceEvent, SequenceResult, StepPlan, StepResult, TokenSlice
from lockstep.kv.index.page_index import PageIndex, PageTable
from lockstep.scheduler.admission import Admission
from lockstep.scheduler.batch import Batch
from lockstep.scheduler.finishing import new_prompt_logprobs, take_tokens
from lockstep.scheduler.intake import expand, validate
from lockstep.scheduler.limits import SchedulerLimits
from lockstep.scheduler.roster import Roster
from lockstep.scheduler.sequence import Sequence
from lockstep.scheduler.totals import Totals


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A plan whose result is awaited, with the sequence of each slice and the page table that it is computed on."""

    plan: StepPlan
    sequences: list[Sequence]
    tables: list[PageTable]


class Scheduler:
    """Decides each step. Deterministic: the same calls give the same plans.

    Each running sequence gets at least one row of every step, so a long prompt delays nobody's decode by more
    than one chunk. Nothing overtakes the first of the queue.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self._pages = PageIndex(
            limits.num_pages,
            limits.page_size,
            enable_prefix_cache=limits.enable_prefix_cache,
            num_host_pages=limits.num_host_pages,
        )
        self._roster = Roster(limits, self._pages)
        self._admission = Admission(limits, self._pages)
        self._totals = Totals()
        self._num_sequences = 0
        self._in_flight: deque[_InFlight] = deque()
        self._unshared: list[Sequence] = []
        """Those whose prompt the last plan went on with by one token, whose page is to be shared."""

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished or a result is awaited."""
        return self._roster.num_requests > 0 or bool(self._in_flight)

    @property
    def num_running(self) -> int:
        """Running sequences."""
        return len(self._roster.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait: new, preempted, or behind the first choice of their request."""
        return self._roster.num_waiting

    def add(self, request: Request) -> None:
        """Queues the request's `params.n` sequences; the i-th has seed (seed + i) mod 2**64.

        Raises InvalidRequest when the request can never run and QueueFull when it may be tried again later.
        """
        validate(request, self.limits)
        self._roster.require_room(request.request_id)
        self._roster.enqueue(expand(request, self._num_sequences, self.limits))
        self._num_sequences += request.params.n

    def abort(self, request_id: str, reason: FinishReason = "abort") -> list[SequenceEvent]:
        """Ends a request at once and frees its pages; a final event for each unfinished index.

        Unknown ids, finished ones among them, give no events. Results still on their way are ignored.
        """
        group = self._roster.group(request_id)
        if group is None:
            return []
        return [self._end(sequence, reason) for sequence in list(group.unfinished.values())]

    def plan(self) -> StepPlan | None:
        """The next step, or None when there is nothing to compute before another result comes.

        Sequences that ended since the last plan are named in the next one; they alone are no reason for a plan.
        Raises IntegrityError while as many results are awaited as may be, or the last plan `must_land`.
        """
        self._require_turn()
        self._share_late()
        batch = Batch(self.limits.chunk_tokens)
        preempted = self._continue_running(batch)
        if not preempted:
            self._admit_waiting(batch)
        if not batch.sequences:
            return None
        batch.longest_first()
        plan = batch.plan(self._totals.num_steps, self._roster.take_departed(), self._pages.take_copies())
        self._totals.num_steps += 1
        self._totals.last_step_tokens = self.limits.chunk_tokens - batch.rows_left
        self._in_flight.append(_InFlight(plan, batch.sequences, batch.tables))
        return plan

    def update(self, result: StepResult) -> list[SequenceEvent]:
        """Takes the result of the oldest plan in flight and says what became of each sequence, in plan order.

        Raises IntegrityError when the result does not answer that plan.
        """
        flight = self._land(result)
        events = []
        num_taken = 0
        for sequence, table, piece, found in zip(
            flight.sequences, flight.tables, flight.plan.slices, result.sequences, strict=True
        ):
            if sequence.ended:
                self._totals.num_discarded_rows += piece.num_tokens
            elif _only_goes_on(sequence, table, piece, found):
                sequence.token_ids.append(found.token_ids[0])
                sequence.num_landed = piece.start + piece.num_tokens
                event = SequenceEvent(sequence.request_id, sequence.index, found.token_ids, found.logprobs)
                event.num_cached_tokens = sequence.num_cached_tokens or 0
                events.append(event)
                num_taken += 1
            elif (news := self._take(sequence, table, piece, found)) is not None:
                events.append(news)
        self._totals.num_output_tokens += num_taken
        return events

    def flush_cache(self) -> int:
        """Forgets every cached prefix that no running sequence uses; returns the number of pages freed."""
        return self._pages.flush()

    def stats(self) -> EngineStats:
        """Figures of this moment, and totals. Times are the engine's to fill in."""
        return EngineStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_pages_total=self._pages.num_pages_total,
            num_pages_in_use=self._pages.num_pages_in_use,
            num_pages_cached=self._pages.num_pages_cached,
            num_host_pages_total=self._pages.num_host_pages_total,
            num_host_pages_cached=self._pages.num_host_pages_cached,
            num_host_cached_tokens=self._pages.num_host_cached_tokens,
            page_size=self.limits.page_size,
            **asdict(self._totals),
        )

    def check(self) -> None:
        """Raises IntegrityError when pages, locks, places or counts contradict each other. For tests: slow."""
        self._roster.check()
        landing: dict[PageTable, int] = {}
        awaited: Counter[Sequence] = Counter()
        for flight in self._in_flight:
            for sequence, table, piece in zip(flight.sequences, flight.tables, flight.plan.slices, strict=True):
                landing[table] = piece.start + piece.num_tokens
                awaited[sequence] += piece.samples
        for sequence in [*self._roster.running, *self._roster.waiting]:
            if sequence.num_awaited != awaited[sequence]:
                raise IntegrityError(
                    f"sequence {sequence.seq_id} awaits other tokens than plans in flight sample"
                )
        for sequence in self._roster.running:
            num_coming = landing.get(sequence.table, sequence.num_landed) if sequence.table else -1
            if num_coming != sequence.num_computed:
                raise IntegrityError(
                    f"sequence {sequence.seq_id} counts other tokens as computed than steps compute"
                )
            if sequence.num_owed < 1 and sequence.table not in landing:
                raise IntegrityError(f"running sequence {sequence.seq_id} owes nothing")

    def _continue_running(self, batch: Batch) -> bool:
        """Plans rows of every running sequence, best rank first; returns whether one was preempted for pages.

        The preempted one is the worst, so never one that is already planned; when it is the needy one itself,
        it was the last.
        """
        num_before = self._totals.num_preemptions
        for position, sequence in enumerate(self._roster.running):
            if not batch.add_next(sequence) and not sequence.awaits_end:
                self._continue(sequence, position, batch)
        return self._totals.num_preemptions > num_before

    def _continue(self, sequence: Sequence, position: int, batch: Batch) -> None:
        """Plans as many rows as the others leave, unless the sequence itself is preempted."""
        while (table := sequence.table) is not None:
            num_rows = min(sequence.num_owed, self._spare_rows(sequence, position, batch))
            num_tokens = sequence.num_computed + num_rows
            new_page_ids = self._pages.grow(table, num_tokens) if num_tokens > table.num_slots else ()
            if new_page_ids is not None:
                self._add(batch, sequence, num_rows, new_page_ids)
                return
            self._roster.preempt_worst()
            self._totals.num_preemptions += 1

    def _spare_rows(self, sequence: Sequence, position: int, batch: Batch) -> int:
        """Rows that leave one for each sequence at a later position.

        A prompt that is cut gets all of them, so that no row is left for a newcomer: it might compute the rest of the
        same prompt beside it.
        """
        num_after = self.num_running - position - 1
        if sequence.num_owed > batch.rows_left - num_after:
            after = islice(self._roster.running, position + 1, None)
            num_after = sum(not other.awaits_end for other in after)
        return batch.rows_left - num_after

    def _admit_waiting(self, batch: Batch) -> None:
        """Starts sequences from the front of the queue while rows, places and pages last."""
        waiting = self._roster.waiting
        while len(waiting) and batch.rows_left:
            sequence = waiting[0]
            entry = self._admission.admit(sequence, self.num_running)
            if entry is None:
                return
            if sequence.is_new:
                self._totals.count_admission(sequence)
            self._roster.start_first()
            start, new_page_ids = entry
            batch.start(start)
            self._add(batch, sequence, min(sequence.num_owed, batch.rows_left), new_page_ids)

    def _add(self, batch: Batch, sequence: Sequence, num_rows: int, new_page_ids: tuple[int, ...]) -> None:
        """Plans rows and shares the pages of a prompt that they fill, now or late. At its end the siblings may come."""
        batch.add(sequence, num_rows, new_page_ids)
        if not sequence.prefilling:
            return
        if num_rows == 1:
            self._unshared.append(sequence)
        else:
            self._share(sequence)
        if sequence.num_computed == len(sequence.token_ids):
            sequence.prefilling = False
            self._roster.unhold(sequence.group)

    def _share(self, sequence: Sequence) -> None:
        assert sequence.table is not None
        self._pages.commit(sequence.table, sequence.token_ids, sequence.num_computed)

    def _share_late(self) -> None:
        """Shares what the last plan could not, of the sequences that still run."""
        for sequence in self._unshared:
            if sequence.table is not None:
                self._share(sequence)
        self._unshared.clear()

    def _require_turn(self) -> None:
        if not self._in_flight:
            return
        last = self._in_flight[-1].plan
        if last.must_land or len(self._in_flight) == self.limits.max_plans_in_flight:
            raise IntegrityError(
                f"step {last.step_id} is in flight: give its result to update() before the next plan()"
            )

    def _land(self, result: StepResult) -> _InFlight:
        """The plan that `result` answers, no longer in flight."""
        if not self._in_flight:
            raise IntegrityError(f"a result of step {result.step_id} arrived, but no step is in flight")
        flight = self._in_flight[0]
        planned = [piece.seq_id for piece in flight.plan.slices]
        found = [sequence.seq_id for sequence in result.sequences]
        if result.step_id != flight.plan.step_id or found != planned:
            raise IntegrityError(
                f"step {flight.plan.step_id} with sequences {planned} is in flight, but the result is of "
                f"step {result.step_id} with sequences {found}"
            )
        return self._in_flight.popleft()

    def _take(
        self, sequence: Sequence, table: PageTable, piece: TokenSlice, found: SequenceResult
    ) -> SequenceEvent | None:
        """What the step means for one unfinished sequence; None when there is no news for the client."""
        if found.error is not None:
            self._pages.withdraw(table)
            return self._end(sequence, "error", error=found.error)
        sequence.num_tokens -= piece.samples
        _require_answer(sequence, piece, found)
        if sequence.table is table:  # else it was preempted since and has to begin again
            sequence.num_landed = piece.start + piece.num_tokens
        if found.embedding is not None:
            return self._end(sequence, "stop", embedding=found.embedding)
        prompt_logprobs = new_prompt_logprobs(sequence, piece, found.prompt_logprobs)
        num_taken, reason, stop_token_id = take_tokens(sequence, found.token_ids, found.complete)
        if not num_taken and reason is None and not prompt_logprobs:
            return None
        self._totals.num_output_tokens += num_taken
        if reason is not None:
            self._leave(sequence, reason)
        return SequenceEvent(
            sequence.request_id,
            sequence.index,
            found.token_ids[:num_taken],
            found.logprobs[:num_taken],
            prompt_logprobs,
            None,
            reason,
            stop_token_id,
            sequence.num_cached_tokens or 0,
        )

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        embedding: tuple[float, ...] | None = None,
        error: str | None = None,
    ) -> SequenceEvent:
        """Ends a sequence that has no new tokens, and says so."""
        self._leave(sequence, reason)
        return SequenceEvent(
            sequence.request_id,
            sequence.index,
            embedding=embedding,
            finish_reason=reason,
            num_cached_tokens=sequence.num_cached_tokens or 0,
            error=error,
        )

    def _leave(self, sequence: Sequence, reason: FinishReason) -> None:
        """Takes an ended sequence out. After an error its pages may hold anything: nothing more is cached."""
        group = sequence.group
        self._roster.discard(sequence, keep=reason != "error")
        self._roster.unhold(group)
        if not group.unfinished:
            self._totals.count_end_of_request(reason)


def _only_goes_on(sequence: Sequence, table: PageTable, piece: TokenSlice, found: SequenceResult) -> bool:
    """Whether all that happened is that a running sequence has one more token and not its last."""
    token_ids = found.token_ids
    return (
        len(token_ids) == 1
        and piece.samples
        and sequence.table is table
        and token_ids[0] not in sequence.stop_token_ids
        and len(sequence.token_ids) + 1 < sequence.max_tokens
        and found.error is None
        and not found.complete
        and not found.prompt_logprobs
        and found.embedding is None
    )


def _require_answer(sequence: Sequence, piece: TokenSlice, found: SequenceResult) -> None:
    """Raises IntegrityError when the executor answers something else than was planned."""
    if piece.samples:
        answered = bool(found.token_ids) or found.complete
    else:
        is_last = piece.start + piece.num_tokens == len(sequence.token_ids)
        answered = not found.token_ids and (found.embedding is not None) == (sequence.embeds and is_last)
    if len(found.token_ids) > 1 and sequence.num_awaited:
        raise IntegrityError(
            f"the result for sequence {piece.seq_id} has {len(found.token_ids)} tokens, but a later plan in flight "
            "counts on one"
        )
    if not answered:
        raise IntegrityError(
            f"the result for sequence {piece.seq_id} does not answer its slice from token {piece.start}: "
            "it lacks tokens or an embedding, or has some that were not asked for"
        )
