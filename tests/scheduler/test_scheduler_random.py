"""Random traffic on tiny pools: nothing leaks, nothing is shared wrongly, each request gets what it asked for.

`python tests/scheduler/test_scheduler_random.py --steps 1000000` runs as long as one likes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from random_driver import RandomDriver, random_limits

from lockstep.core.errors import IntegrityError
from lockstep.core.request import Request
from lockstep.core.sampling import SamplingParams
from lockstep.core.step import SequenceResult, StepPlan, StepResult, TokenSlice
from lockstep.kv.index.page_index import PageIndex
from lockstep.kv.index.radix_tree import RadixTree
from lockstep.scheduler import scheduler as scheduler_module
from lockstep.scheduler.batch import Batch
from lockstep.scheduler.limits import SchedulerLimits
from lockstep.scheduler.roster import Roster
from lockstep.scheduler.scheduler import Scheduler
from lockstep.scheduler.sequence import Sequence

pytestmark = pytest.mark.suite("cpu")

NUM_STEPS = 20_000
STEPS_PER_EPISODE = 400

MUST_HAPPEN = (
    "aborted",
    "dropped tokens",
    "error",
    "hit tokens",
    "host hit tokens",
    "length",
    "news",
    "preemptions",
    "queue full",
    "recomputed",
    "single steps",
    "started beside others",
    "stop",
    "traffic in flight",
)


def run_episodes(num_steps: int, first_seed: int = 0, *, overlap: bool = False) -> Counter[str]:
    """Episodes of fresh limits and traffic, a seed each. Returns how often each thing happened."""
    seen: Counter[str] = Counter()
    for seed in range(first_seed, first_seed + -(-num_steps // STEPS_PER_EPISODE)):
        rng = Random(seed)
        driver = RandomDriver(random_limits(rng, overlap=overlap), rng, seen)
        try:
            driver.run(STEPS_PER_EPISODE)
        except Exception:
            print(f"seed {seed}: {driver.limits}")
            raise
    return seen


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapped"])
def test_random_traffic(overlap: bool) -> None:
    seen = run_episodes(NUM_STEPS, overlap=overlap)
    print(dict(seen))
    for event in MUST_HAPPEN:
        if event != "dropped tokens" or not overlap:
            assert seen[event] >= 20, f"{event} hardly happened: {seen}"
    assert (seen["planned ahead"] > NUM_STEPS / 4) == overlap
    assert seen["read in their step"] > 100 and (seen["read in flight"] > 100) == overlap


def _plans(seed: int, overlap: bool = False) -> list[StepPlan]:
    rng = Random(seed)
    driver = RandomDriver(random_limits(rng, overlap=overlap), rng)
    driver.run(150, keep_plans=True)
    return driver.plans


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_same_calls_give_equal_plans(seed: int, overlap: bool) -> None:
    first, second = _plans(seed, overlap), _plans(seed, overlap)
    assert len(first) > 100
    assert first == second


def test_plans_do_not_depend_on_the_hash_seed() -> None:
    """Sets and identities order differently in another process; plans must not."""
    code = (
        f"import hashlib, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_scheduler_random import _plans\n"
        "text = repr([_plans(seed, seed % 2 == 1) for seed in range(6)])\n"
        "print(len(text), hashlib.sha256(text.encode()).hexdigest())"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert found[0] == found[1]
    assert int(found[0].split()[0]) > 10_000


def _never_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached prefixes in use may be evicted."""
    monkeypatch.setattr(RadixTree, "lock", lambda self, node: None)
    monkeypatch.setattr(RadixTree, "unlock", lambda self, node: self.touch(node))


def _share_partial_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page that is still being filled is cached."""
    commit = PageIndex.commit

    def mutant(self: PageIndex, table: Any, token_ids: list[int], num_computed: int) -> None:
        commit(self, table, token_ids, min(num_computed + 1, len(token_ids), table.num_slots))

    monkeypatch.setattr(PageIndex, "commit", mutant)


def _share_what_is_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of the prompt is cached a step before it is computed."""
    commit = PageIndex.commit

    def mutant(self: PageIndex, table: Any, token_ids: list[int], num_computed: int) -> None:
        commit(self, table, token_ids, min(num_computed + self.page_size, len(token_ids)))

    monkeypatch.setattr(PageIndex, "commit", mutant)


def _share_what_one_token_fills_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is admitted to the same plan starts from a page that a slice of one token fills."""
    add = Scheduler._add

    def mutant(self: Scheduler, *given: Any) -> None:
        add(self, *given)
        self._share_late()

    monkeypatch.setattr(Scheduler, "_add", mutant)


def _let_others_start_from_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error, what was shared before stays so."""
    monkeypatch.setattr(PageIndex, "withdraw", lambda self, table: None)


def _compare_first_pages_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """An edge is taken to match when its first page does."""

    def mutant(self: RadixTree, node: Any, token_ids: list[int], start: int, limit: int) -> int:
        return min(len(node.page_ids), (limit - start) // self.page_size)

    monkeypatch.setattr(RadixTree, "_num_shared_pages", mutant)


def _hit_the_whole_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hit may cover the last token."""
    match = RadixTree.match

    def mutant(self: RadixTree, token_ids: Any, limit: int, **where: Any) -> Any:
        return match(self, token_ids, len(token_ids) if limit == len(token_ids) - 1 else limit, **where)

    monkeypatch.setattr(RadixTree, "match", mutant)


def _leak_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that the tree did not take are forgotten."""
    insert = RadixTree.insert
    monkeypatch.setattr(RadixTree, "insert", lambda *args, **below: (insert(*args, **below)[0], ()))


def _commit_before_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preempted or aborted sequence caches pages that it has not written."""
    release = PageIndex.release

    def mutant(self: PageIndex, table: Any, token_ids: Any = (), num_computed: int = 0) -> None:
        release(self, table, token_ids, min(len(token_ids), table.num_slots))

    monkeypatch.setattr(PageIndex, "release", mutant)


def _ignore_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hits for requests that need every prompt row."""
    monkeypatch.setattr(Sequence, "may_read_cache", True)


def _plan_past_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence whose last token is in flight is planned again."""
    monkeypatch.setattr(Sequence, "awaits_end", False)


def _forget_what_a_preempted_one_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preemption drops the tokens in flight."""
    preempt = Roster.preempt_worst

    def mutant(self: Roster) -> None:
        self.running[-1].num_tokens = len(self.running[-1].token_ids)
        preempt(self)

    monkeypatch.setattr(Roster, "preempt_worst", mutant)


def _go_on(monkeypatch: pytest.MonkeyPatch, though: Callable[..., bool]) -> None:
    """One more token is taken as nothing but that in more cases than it is."""
    only_goes_on = scheduler_module._only_goes_on

    def mutant(sequence: Sequence, table: Any, piece: TokenSlice, found: SequenceResult) -> bool:
        is_one = piece.samples and len(found.token_ids) == 1
        return only_goes_on(sequence, table, piece, found) or (is_one and though(sequence, table, found))

    monkeypatch.setattr(scheduler_module, "_only_goes_on", mutant)


def _go_on_after_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    _go_on(monkeypatch, lambda sequence, table, found: found.token_ids[0] in sequence.stop_token_ids)


def _go_on_after_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    _go_on(monkeypatch, lambda sequence, table, found: len(sequence.token_ids) + 1 >= sequence.max_tokens)


def _go_on_though_preempted(monkeypatch: pytest.MonkeyPatch) -> None:
    _go_on(monkeypatch, lambda sequence, table, found: sequence.table is not table)


def _plan_without_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence goes on where its pages are full."""
    add_next = Batch.add_next

    def mutant(self: Batch, sequence: Sequence) -> bool:
        table = sequence.table
        assert table is not None
        num_slots, table.num_slots = table.num_slots, 10**9
        try:
            return add_next(self, sequence)
        finally:
            table.num_slots = num_slots

    monkeypatch.setattr(Batch, "add_next", mutant)


LATE_MUTANTS: list[Callable[[pytest.MonkeyPatch], None]] = [
    _plan_past_the_end,
    _forget_what_a_preempted_one_sampled,
    _go_on_though_preempted,
]

MUTANTS: list[Callable[[pytest.MonkeyPatch], None]] = [
    _never_lock,
    _share_partial_pages,
    _compare_first_pages_only,
    _hit_the_whole_prompt,
    _leak_duplicates,
    _commit_before_computing,
    _ignore_all_rows,
    _go_on_after_a_stop,
    _go_on_after_the_last,
    _share_what_is_not_planned,
    _share_what_one_token_fills_at_once,
    _let_others_start_from_what_failed,
    _plan_without_a_slot,
]


@pytest.mark.parametrize(
    ("mutate", "overlap"),
    [*((mutate, False) for mutate in MUTANTS), *((mutate, True) for mutate in [*MUTANTS, *LATE_MUTANTS])],
)
def test_random_traffic_notices(
    mutate: Callable[[pytest.MonkeyPatch], None], overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The self-check is off here: the executor's view alone must tell (leaks show in the final figures)."""
    mutate(monkeypatch)
    monkeypatch.setattr(Scheduler, "check", lambda self: None)
    with pytest.raises((AssertionError, IntegrityError)):
        run_episodes(NUM_STEPS, overlap=overlap)


def test_host_cost_of_256_decoding_sequences() -> None:
    """One plan and update, without the executor's own work, in the middle of long generations."""
    num_sequences, num_steps = 256, 60
    scheduler = Scheduler(
        SchedulerLimits(
            max_running_requests=num_sequences,
            chunk_tokens=8192,
            max_queued_requests=num_sequences,
            context_length=8192,
            page_size=16,
            num_pages=65536,
            eos_token_ids=(0,),
        )
    )
    for number in range(num_sequences):
        prompt = tuple(range(number, number + 1000))
        scheduler.add(Request(request_id=str(number), prompt_token_ids=prompt, params=SamplingParams(seed=1)))
    durations_s: list[float] = []
    while len(durations_s) < num_steps:
        started_s = time.perf_counter()
        plan = scheduler.plan()
        planned_s = time.perf_counter()
        assert plan is not None
        result = StepResult(
            plan.step_id,
            tuple(SequenceResult(piece.seq_id, (5,) if piece.samples else ()) for piece in plan.slices),
        )
        answered_s = time.perf_counter()
        events = scheduler.update(result)
        updated_s = time.perf_counter()
        if plan.num_tokens == num_sequences:
            assert len(events) == num_sequences
            durations_s.append(planned_s - started_s + updated_s - answered_s)
    scheduler.check()
    median_ms = sorted(durations_s)[num_steps // 2] * 1000
    print(f"plan + update of {num_sequences} decoding sequences: median {median_ms:.3f} ms")
    assert median_ms < 1.3, "ten times what one core of a small machine takes"


def main() -> None:
    parser = argparse.ArgumentParser(description="Random traffic with the integrity check after each step.")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first episode")
    parser.add_argument("--overlap", action="store_true", help="results may come a step late")
    options = parser.parse_args()
    started_s = time.perf_counter()
    seen = run_episodes(options.steps, options.seed, overlap=options.overlap)
    print(f"{options.steps} steps in {time.perf_counter() - started_s:.0f} s, nothing wrong: {dict(seen)}")


if __name__ == "__main__":
    main()
