"""An executor without a model: it checks every plan against what a real one relies on, and answers at random.

The KV of a token depends on all tokens before it. So the content of a slot is modelled as a hash of the whole prefix
that ends there, and each slice may run only if the slots before it hold exactly its own sequence's hashes. Slices run
in the order of their plan, so each may read what earlier ones of the same step write, and nothing that comes later;
where all are of one token, none may read what another writes, whatever the order. Sharing a wrong page or one that
nobody computes, evicting a page in use or one that is not written yet, and writing to another's page all show up here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from random import Random

from lockstep.core.step import (
    SequenceResult,
    SequenceStart,
    StepPlan,
    StepResult,
    TokenLogprob,
    TokenSlice,
)
from lockstep.scheduler.limits import SchedulerLimits

NOTHING = -1
"""What a slot holds that was not written since its page was given away."""
FROM_HOST = -1
"""Where a step is expected: none wrote the page, a copy did."""


@dataclass
class LiveSequence:
    """What the executor knows of a sequence: its start, all tokens, their prefix hashes, its page table.

    One that is `over` (it failed, or a feature allowed no token) has nothing that a next step could compute.
    """

    start: SequenceStart
    token_ids: list[int]
    prefix_hashes: list[int]
    page_ids: list[int]
    num_computed: int
    own_page_ids: set[int] = field(default_factory=set)
    """Those that it was given empty, and may write."""
    over: bool = False


@dataclass
class SimulatedExecutor:
    """`vocab_size` small makes stop tokens frequent. Rates are per sampled slice."""

    limits: SchedulerLimits
    rng: Random
    vocab_size: int = 8
    speculation_rate: float = 0.1
    complete_rate: float = 0.005
    error_rate: float = 0.002
    live: dict[int, LiveSequence] = field(default_factory=dict)
    offered: dict[int, list[int]] = field(default_factory=dict)
    """All tokens that ever reached the scheduler, by sequence."""
    completed: set[int] = field(default_factory=set)
    num_recomputed_sequences: int = 0
    num_hit_tokens: int = 0
    num_host_hit_tokens: int = 0
    num_discarded_rows: int = 0
    num_pages_read_in_their_step: int = 0
    num_pages_read_in_flight: int = 0
    num_single_steps: int = 0
    num_started_beside_others: int = 0
    """Steps of single tokens in which sequences began beside others that went on."""
    _slots: dict[int, list[int]] = field(default_factory=dict)
    _host_slots: dict[int, list[int]] = field(default_factory=dict)
    _num_tables_with_page: Counter[int] = field(default_factory=Counter)
    _written_at: dict[int, int] = field(default_factory=dict)
    """The last step that wrote to each page, or FROM_HOST."""
    _num_landed: int = 0
    _suspects: set[int] = field(default_factory=set)
    """Pages that a sequence computed which failed: no sequence may start from them."""
    _host_suspects: set[int] = field(default_factory=set)

    def run(self, plan: StepPlan) -> StepResult:
        """Checks and executes one plan. The scheduler may take the answer later: see `land`."""
        for seq_id in plan.ended:
            self._forget(seq_id)
        self._copy(plan)
        assert 1 <= plan.num_tokens <= self.limits.chunk_tokens
        assert len({piece.seq_id for piece in plan.slices}) == len(plan.slices)
        starts = {start.seq_id: start for start in plan.started}
        is_single = all(piece.num_tokens == 1 for piece in plan.slices)
        for piece in plan.slices:
            if piece.seq_id in starts:
                self._enter(starts.pop(piece.seq_id), plan.step_id)
            self._prepare(piece)
            self._write(piece, plan.step_id)
        if is_single:
            self._require_apart(plan)
        assert not starts, "a sequence started without a slice"
        assert all(self._has_all(seq_id) for seq_id in set(self.live) - {piece.seq_id for piece in plan.slices})
        assert len(self.live) <= self.limits.max_running_requests
        may_speculate = self.limits.max_plans_in_flight == 1 or plan.must_land
        rate = self.speculation_rate if may_speculate else 0.0
        return StepResult(plan.step_id, tuple(self._answer(piece, rate) for piece in plan.slices))

    def land(self, plan: StepPlan, result: StepResult, ended: set[int], running: set[int]) -> None:
        """The scheduler is about to take the result; it discards what belongs to `ended` sequences."""
        self._num_landed = plan.step_id + 1
        for piece, found in zip(plan.slices, result.sequences, strict=True):
            if found.seq_id in ended:
                self.num_discarded_rows += piece.num_tokens
                continue
            if found.error is not None and found.seq_id in running:
                self._suspects |= self.live[found.seq_id].own_page_ids
            self.offered[found.seq_id].extend(found.token_ids)
            if found.complete:
                self.completed.add(found.seq_id)

    def _copy(self, plan: StepPlan) -> None:
        """Moves the contents of pages to the host and back, in order."""
        for copy in plan.page_copies:
            assert 0 <= copy.host_page_id < self.limits.num_host_pages
            if copy.to_host:
                held = self._slots[copy.page_id]
                assert NOTHING not in held, "a page is saved before it is computed"
                self._host_slots[copy.host_page_id] = list(held)
                _pass_on(copy.page_id, self._suspects, copy.host_page_id, self._host_suspects)
            else:
                assert not self._num_tables_with_page[copy.page_id], "a page in use is overwritten"
                self._slots[copy.page_id] = list(self._host_slots[copy.host_page_id])
                self._written_at[copy.page_id] = FROM_HOST
                _pass_on(copy.host_page_id, self._host_suspects, copy.page_id, self._suspects)

    def _has_all(self, seq_id: int) -> bool:
        """Whether a running sequence may go without a row: it has its last token, or its embedding, or is over."""
        live = self.live[seq_id]
        limits, start = self.limits, live.start
        room = min(limits.context_length, limits.num_pages * limits.page_size + 1) - start.num_prompt_tokens
        most = min(start.params.max_tokens or room, room)
        embedded = start.pooling is not None and live.num_computed == len(live.token_ids)
        return live.over or embedded or len(live.token_ids) - start.num_prompt_tokens >= most

    def _enter(self, start: SequenceStart, step_id: int) -> None:
        assert start.seq_id not in self.live, "a sequence started twice"
        assert 0 <= start.num_cached_tokens < len(start.token_ids), "nothing is left to compute"
        on_device = len(start.page_ids) * self.limits.page_size
        assert on_device == start.num_cached_tokens or (
            self.limits.num_host_pages and on_device < start.num_cached_tokens
        )
        self.num_host_hit_tokens += start.num_cached_tokens - on_device
        generated = self.offered.setdefault(start.seq_id, [])
        assert list(start.token_ids[start.num_prompt_tokens :]) == generated, "a preemption lost tokens"
        if generated:
            self.num_recomputed_sequences += 1
        self.num_hit_tokens += start.num_cached_tokens
        live = LiveSequence(start, [], [], list(start.page_ids), start.num_cached_tokens)
        self.live[start.seq_id] = live
        self._learn(live, start.token_ids)
        self._num_tables_with_page.update(start.page_ids)
        assert self._suspects.isdisjoint(start.page_ids), "a sequence starts from what a failed one computed"
        written_at = [self._written_at[page_id] for page_id in start.page_ids]
        self.num_pages_read_in_their_step += written_at.count(step_id)
        self.num_pages_read_in_flight += sum(self._num_landed <= at < step_id for at in written_at)

    def _forget(self, seq_id: int) -> None:
        for page_id in self.live.pop(seq_id).page_ids:
            self._num_tables_with_page[page_id] -= 1

    @staticmethod
    def _learn(live: LiveSequence, token_ids: tuple[int, ...]) -> None:
        for token_id in token_ids:
            before = live.prefix_hashes[-1] if live.prefix_hashes else 0
            live.prefix_hashes.append(hash((before, token_id)))
            live.token_ids.append(token_id)

    def _prepare(self, piece: TokenSlice) -> None:
        """Everything that must hold before the step runs."""
        live = self.live[piece.seq_id]
        for page_id in piece.new_page_ids:
            self._give(live, page_id)
        stop = piece.start + piece.num_tokens
        size = self.limits.page_size
        assert piece.num_tokens >= 1 and piece.start == live.num_computed
        assert stop <= len(live.page_ids) * size, "a slice has no slots"
        if live.over:
            assert self.limits.max_plans_in_flight > 1
            live.prefix_hashes.append(NOTHING)
            return
        assert stop <= len(live.token_ids), "a slice computes tokens that nobody knows"
        assert piece.samples == (stop == len(live.token_ids) and live.start.pooling is None)
        for number, page_id in enumerate(live.page_ids):
            first = number * size
            if first >= piece.start:
                break
            expected = live.prefix_hashes[first : min(first + size, piece.start)]
            written = self._slots.get(page_id, [])[: len(expected)]
            assert written == expected, f"page {page_id} does not hold tokens {first}.. of {piece}"

    def _require_apart(self, plan: StepPlan) -> None:
        """Rows of single tokens may run in any order: the slot that one writes is read by no other."""
        size = self.limits.page_size
        pages = [self.live[piece.seq_id].page_ids for piece in plan.slices]
        written = {of_row[row.start // size]: row for row, of_row in zip(plan.slices, pages, strict=True)}
        assert len(written) == len(plan.slices), "two rows write to one page"
        for row, of_row in zip(plan.slices, pages, strict=True):
            for number in range(-(-row.start // size)):
                writer = written.get(of_row[number], row)
                slot = number * size + writer.start % size
                assert writer is row or slot >= row.start, f"{row} reads what {writer} writes beside it"
        self.num_single_steps += 1
        self.num_started_beside_others += bool(plan.started) and len(plan.slices) > len(plan.started)

    def _give(self, live: LiveSequence, page_id: int) -> None:
        """One more page for a sequence: with what came back from the host, or empty."""
        assert not self._num_tables_with_page[page_id], "a page in use is given away"
        self._num_tables_with_page[page_id] += 1
        if len(live.page_ids) * self.limits.page_size >= live.start.num_cached_tokens:
            live.own_page_ids.add(page_id)
            self._slots[page_id] = [NOTHING] * self.limits.page_size
            self._suspects.discard(page_id)
        assert page_id not in self._suspects, "what a failed sequence computed came back from the host"
        live.page_ids.append(page_id)

    def _write(self, piece: TokenSlice, step_id: int) -> None:
        live = self.live[piece.seq_id]
        size = self.limits.page_size
        live.num_computed = piece.start + piece.num_tokens
        for position in range(piece.start, live.num_computed):
            page_id = live.page_ids[position // size]
            assert page_id in live.own_page_ids, f"{piece} writes to another's page {page_id}"
            self._slots[page_id][position % size] = live.prefix_hashes[position]
            self._written_at[page_id] = step_id

    def _answer(self, piece: TokenSlice, speculation_rate: float) -> SequenceResult:
        live = self.live[piece.seq_id]
        rng, params = self.rng, live.start.params
        if live.over or rng.random() < self.error_rate:
            live.over = True
            return SequenceResult(piece.seq_id, error="numbers went bad")
        prompt_logprobs: tuple[TokenLogprob, ...] = ()
        if params.prompt_logprobs is not None:
            stop = min(live.num_computed, live.start.num_prompt_tokens - 1)
            described = live.token_ids[piece.start + 1 : stop + 1]
            prompt_logprobs = tuple(TokenLogprob(token_id, -1.0) for token_id in described)
        if not piece.samples:
            embeds = live.start.pooling is not None and live.num_computed == len(live.token_ids)
            return SequenceResult(
                piece.seq_id, prompt_logprobs=prompt_logprobs, embedding=(1.0, 2.0) if embeds else None
            )
        count = rng.randint(2, 4) if rng.random() < speculation_rate else 1
        complete = rng.random() < self.complete_rate
        token_ids = tuple(rng.randrange(self.vocab_size) for _ in range(count - (complete and count == 1)))
        live.over = not token_ids
        self._learn(live, token_ids)
        logprobs = tuple(TokenLogprob(token_id, -1.0) for token_id in token_ids)
        return SequenceResult(
            piece.seq_id,
            token_ids,
            logprobs if params.logprobs is not None else (),
            prompt_logprobs,
            complete=complete,
        )


def _pass_on(source: int, sources: set[int], target: int, targets: set[int]) -> None:
    """The target is a member of its set exactly if the source is of its own."""
    if source in sources:
        targets.add(target)
    else:
        targets.discard(target)
