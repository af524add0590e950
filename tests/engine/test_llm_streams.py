"""Streams, tasks, threads and the end of an `LLM`: nothing is lost, nothing is left behind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_llm import assert_same, make_tiny, open_tiny, random_prompts

from lockstep.core.errors import EngineDead, LockstepError
from lockstep.core.sampling import Grammar, SamplingParams
from lockstep.core.step import StepPlan
from lockstep.engine.llm import LLM, Completion
from lockstep.scheduler.scheduler import Scheduler

pytestmark = pytest.mark.suite("cpu")

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=1)
LONG = replace(GREEDY, max_tokens=150)
WRITING = "Grüße aus Zürich! 🦊 Привет, 世界. Once upon a time"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    make_tiny(directory)
    return directory


@pytest.fixture
def llm(path: Path) -> Iterator[LLM]:
    with open_tiny(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def writer() -> Iterator[LLM]:
    """The embedded model: its text has characters of several tokens."""
    with LLM(threads=1, max_total_tokens=2048) as opened:
        yield opened


def assert_idle(llm: LLM, *, num_aborted: int) -> None:
    """Only the prefix cache holds pages; the scheduler's own check agrees."""
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_pages_in_use) == (0, 0, 0)
    assert stats.num_aborted == num_aborted
    llm._engine.loop.core.scheduler.check()
    llm.flush_cache()
    assert llm.stats().num_pages_cached == 0


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        replace(GREEDY, temperature=1.5, seed=4),
        replace(GREEDY, temperature=1.5, seed=9, stop=("the", "a", "\u0430")),
        replace(GREEDY, temperature=1.5, seed=4, n=3),
    ],
)
def test_the_pieces_of_a_stream_are_the_whole_answer(writer: LLM, params: SamplingParams) -> None:
    whole = writer.generate([WRITING], params)[0]
    outputs = list(writer.stream(WRITING, params))
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    for index, choice in enumerate(whole.choices):
        deltas = [delta for output in outputs for delta in output.deltas if delta.index == index]
        assert "".join(delta.text for delta in deltas) == choice.text
        assert sum((delta.token_ids for delta in deltas), ()) == choice.token_ids
        assert sum((delta.logprobs for delta in deltas), ()) == choice.logprobs
        assert [delta.finish_reason for delta in deltas if delta.finish_reason] == [choice.finish_reason]
    assert outputs[-1].num_output_tokens == sum(len(choice.token_ids) for choice in whole.choices)
    assert outputs[-1].num_prompt_tokens == len(whole.prompt_token_ids)


def test_no_piece_ends_inside_a_character(llm: LLM) -> None:
    """Every token of the tiny model is one byte, so these characters come in two, three and four tokens."""
    params = SamplingParams(seed=1, max_tokens=60, grammar=Grammar("regex", "[é世🦊]{8}"))
    outputs = list(llm.stream([1, 2, 3], params))
    pieces = [delta.text for output in outputs for delta in output.deltas]
    assert outputs[-1].num_output_tokens > 16
    assert set(pieces) <= {"", "é", "世", "🦊"} and sum(map(bool, pieces)) == 8


def test_closing_a_stream_frees_its_pages(llm: LLM) -> None:
    prompts = random_prompts((30, 50))
    first, second = llm.stream(prompts[0], LONG), llm.stream(prompts[1], GREEDY)
    next(first), next(second)
    assert llm.stats().num_running == 2
    first.close()
    rest = list(second)
    assert rest[-1].finished
    assert_idle(llm, num_aborted=1)


def test_a_stream_that_is_never_read_asks_for_nothing(llm: LLM) -> None:
    stream = llm.stream([1, 2, 3], LONG)
    stream.close()
    del stream
    assert llm.stats().num_prompt_tokens == 0
    assert_idle(llm, num_aborted=0)


def test_an_answer_ended_by_a_stop_string_frees_its_pages(writer: LLM) -> None:
    before = writer.stats().num_aborted
    answer = writer.generate(["One two three four five"], replace(LONG, stop=(" ",)))[0]
    assert answer.finish_reason == "stop"
    assert_idle(writer, num_aborted=before + 1)


def test_flushing_the_cache_loses_nothing_of_running_streams(llm: LLM) -> None:
    prompts = random_prompts((20, 33))
    expected = llm.generate(prompts, GREEDY)
    streams = [llm.stream(prompt, GREEDY) for prompt in prompts]
    tokens: list[list[int]] = [[], []]
    for _ in range(40):
        for stream, found in zip(streams, tokens, strict=True):
            found.extend(next(stream).deltas[0].token_ids)
        llm.flush_cache()
    assert tokens == [list(answer.token_ids) for answer in expected]


def test_more_prompts_than_the_queue_holds(path: Path) -> None:
    prompts = random_prompts([3] * 30)
    params = replace(GREEDY, max_tokens=4)
    with open_tiny(path, max_queued_requests=2, max_running_requests=3) as narrow, open_tiny(path) as wide:
        assert_same(narrow.generate(prompts, params), wide.generate(prompts, params))
        assert_idle(narrow, num_aborted=0)


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_of_many_prompts_the_first_begin_before_the_last_are_taken_in(
    path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """Unless their order is not that of their arrival."""
    prompts, waiting, plan = random_prompts([10] * 30), list[int](), Scheduler.plan

    def noted(self: Scheduler) -> StepPlan | None:
        waiting.append(self.num_waiting)
        return plan(self)

    params = replace(GREEDY, max_tokens=4)
    with open_tiny(path) as at_once:
        expected = at_once.generate(prompts, params)
    with open_tiny(path, chunked_prefill_size=40, max_running_requests=30, schedule_policy=policy) as llm:
        monkeypatch.setattr(Scheduler, "plan", noted)
        assert_same(llm.generate(prompts, params), expected)
        assert_idle(llm, num_aborted=0)
    assert waiting[0] == (8 if policy == "fcfs" else 30)


async def collect(llm: LLM, prompt: list[int], params: SamplingParams) -> list[int]:
    found: list[int] = []
    async for output in llm.astream(prompt, params):
        found.extend(output.deltas[0].token_ids)
    return found


def test_tasks_share_an_llm(llm: LLM) -> None:
    prompts = random_prompts((3, 17, 40, 5, 8))
    expected = [list(answer.token_ids) for answer in llm.generate(prompts, GREEDY)]

    async def together() -> list[list[int]]:
        return list(await asyncio.gather(*(collect(llm, prompt, GREEDY) for prompt in prompts)))

    before = llm.stats().num_steps
    assert asyncio.run(together()) == expected
    assert llm.stats().num_steps - before < 5 * 40, "they did not share steps"
    assert_idle(llm, num_aborted=0)


def test_leaving_or_cancelling_a_task_ends_its_request(llm: LLM) -> None:
    async def leave() -> None:
        stream = llm.astream([1, 2, 3], LONG)
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]

    async def cancel() -> None:
        task = asyncio.create_task(collect(llm, [4, 5, 6], LONG))
        while llm.stats().num_running == 0:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    asyncio.run(cancel())
    assert_idle(llm, num_aborted=2)
    steps = llm.stats().num_steps
    time.sleep(0.05)
    assert llm.stats().num_steps == steps, "a thread still works for a request that nobody reads"


def test_threads_share_an_llm(llm: LLM) -> None:
    prompts = random_prompts((9, 21, 34))
    expected = [llm.generate([prompt], GREEDY) for prompt in prompts]
    found: dict[int, list[Completion]] = {}

    def work(at: int) -> None:
        found[at] = llm.generate([prompts[at]], GREEDY)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at in range(3):
        assert_same(found[at], expected[at])
    assert_idle(llm, num_aborted=0)


def test_a_thread_that_never_pauses_lets_others_have_their_turn(llm: LLM) -> None:
    """Of a short answer beside a long one, the engine does hardly more steps than it takes."""
    prompts = random_prompts((9, 9))
    long = threading.Thread(target=llm.generate, args=(prompts[:1], replace(GREEDY, max_tokens=240)))
    long.start()
    try:
        while long.is_alive() and not llm.stats().num_running:
            time.sleep(0.001)
        for _ in range(5):
            num_steps = llm.stats().num_steps
            llm.generate(prompts[1:], replace(GREEDY, max_tokens=4))
            assert llm.stats().num_steps - num_steps < 20
        assert long.is_alive(), "too quick to show anything"
    finally:
        long.join()


def test_when_one_of_many_fails_nobody_computes_the_others(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(output: object) -> None:
        raise LockstepError("generation failed: for the test")

    prompts, narrow = random_prompts([9] * 60), {"max_running_requests": 4, "max_queued_requests": 8}
    with open_tiny(path, **narrow, chunked_prefill_size=64) as llm:
        with monkeypatch.context() as patched, pytest.raises(LockstepError, match="for the test"):
            patched.setattr("lockstep.engine.llm._require_success", fail)
            llm.generate(prompts, GREEDY)
        stats = llm.stats()
        llm.generate(prompts[:1], replace(GREEDY, max_tokens=4))
        assert llm.stats().num_steps - stats.num_steps < 8
        assert (stats.num_running, stats.num_waiting) == (0, 0)


def test_two_llms_in_one_process(path: Path, tmp_path: Path) -> None:
    """Other weights, other settings, steps in turn."""
    make_tiny(tmp_path, "qwen3", seed=5)
    prompt = random_prompts((25,))[0]
    with open_tiny(path) as one, open_tiny(tmp_path, page_size=16, max_total_tokens=256) as other:
        alone = [one.generate([prompt], GREEDY), other.generate([prompt], GREEDY)]
        assert alone[0][0].token_ids != alone[1][0].token_ids
        for llm in (one, other):
            llm.flush_cache()
        streams = [one.stream(prompt, GREEDY), other.stream(prompt, GREEDY)]
        tokens: list[list[int]] = [[], []]
        for _ in range(40):
            for stream, found in zip(streams, tokens, strict=True):
                found.extend(next(stream).deltas[0].token_ids)
        assert [tuple(found) for found in tokens] == [answers[0].token_ids for answers in alone]


def test_a_closed_llm_says_so(path: Path) -> None:
    with open_tiny(path) as llm:
        stream = llm.stream([1, 2, 3], LONG)
        next(stream)
    with pytest.raises(EngineDead, match="was closed"):
        next(stream)
    with pytest.raises(EngineDead, match="was closed"):
        llm.generate([[1, 2, 3]], GREEDY)
    llm.close()


def test_a_step_that_fails_is_the_last(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(plan: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(llm._engine.loop.core.executor, "submit", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        llm.generate([[1, 2, 3]], GREEDY)
    monkeypatch.undo()
    with pytest.raises(EngineDead, match="RuntimeError: the device is gone"):
        llm.generate([[1, 2, 3]], GREEDY)
