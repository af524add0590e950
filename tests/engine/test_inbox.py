"""Outputs on their way to a reader: nothing lost, nothing out of order, errors last, all readers in one turn."""

from __future__ import annotations

import asyncio

import pytest

from lockstep.core.errors import EngineDead
from lockstep.core.request import FinishReason, Request
from lockstep.core.sampling import SamplingParams
from lockstep.core.step import SequenceEvent
from lockstep.engine.inbox import Inbox, Turns
from lockstep.engine.output import RequestStream
from lockstep.tokenizer.tokenizer import Tokenizer
from lockstep.tokenizer.vocabulary import Vocabulary

pytestmark = pytest.mark.suite("cpu", seconds=1)

TOKENIZER = Tokenizer(None, Vocabulary([f"<{i}>" for i in range(9)], str.encode, frozenset()))  # type: ignore[arg-type]


def inbox(stop: tuple[str, ...] = ()) -> Inbox:
    request = Request(request_id="r", prompt_token_ids=(1,), params=SamplingParams(stop=stop, max_tokens=9))
    return Inbox(RequestStream(request, TOKENIZER))


def event(token_id: int, finish_reason: FinishReason | None = None) -> SequenceEvent:
    return SequenceEvent("r", 0, (token_id,), finish_reason=finish_reason)


async def text_of(box: Inbox) -> str:
    return (await asyncio.wait_for(box.next(), 1.0)).deltas[0].text


def test_what_came_meanwhile_is_one_output_and_the_error_comes_last() -> None:
    async def read() -> list[str]:
        box = inbox()
        box.add(event(1))
        texts = [await text_of(box)]
        for token_id in (2, 3):
            box.add(event(token_id))
        box.fail(EngineDead("gone"))
        box.fail(EngineDead("shutting down"))
        assert not box.expects_more
        texts.append(await text_of(box))
        for _ in range(2):
            with pytest.raises(EngineDead, match="gone"):
                await box.next()
        return texts

    assert asyncio.run(read()) == ["<1>", "<2><3>"]


def test_first_and_last_are_given_at_once_and_the_others_when_it_is_their_turn() -> None:
    async def read() -> list[str]:
        box = inbox()
        box.add(event(1))
        texts = [await text_of(box)]
        reading = asyncio.ensure_future(text_of(box))
        for token_id in (2, 3):
            box.add(event(token_id))
            await asyncio.sleep(0)
            assert not reading.done()
        box.give()
        texts.append(await reading)
        box.give()  # nothing new: nobody is woken
        reading = asyncio.ensure_future(text_of(box))
        await asyncio.sleep(0)
        assert not reading.done()
        box.add(event(4, "length"))
        return [*texts, await reading]

    assert asyncio.run(read()) == ["<1>", "<2><3>", "<4>"]


def test_a_stop_string_is_found_before_the_turn_comes() -> None:
    async def read() -> str:
        box = inbox(stop=("3><4",))
        for token_id in (1, 2, 3):
            box.add(event(token_id))
        assert not box.engine_unaware
        box.add(event(4))
        assert box.engine_unaware and not box.expects_more
        return await text_of(box)

    assert asyncio.run(read()) == "<1><2><"


def test_news_for_a_reader_that_was_just_cut_off_harm_nobody() -> None:
    async def read() -> str:
        box = inbox()
        reading = asyncio.ensure_future(box.next())
        await asyncio.sleep(0)
        reading.cancel()
        box.add(event(1))  # the reader's task has not run since
        with pytest.raises(asyncio.CancelledError):
            await reading
        return await text_of(box)

    assert asyncio.run(read()) == "<1>"


class Moments:
    """Turns on a clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.given_s: list[float] = []
        self.turns = Turns(lambda: self.given_s.append(self.now_s))

    async def ask(self, at_s: float, interval_s: float) -> None:
        await self.pass_to(at_s)
        self.turns.ask(interval_s)

    async def pass_to(self, at_s: float) -> None:
        self.now_s = at_s
        asyncio.get_running_loop().time = lambda: self.now_s  # type: ignore[method-assign]
        for _ in range(3):
            await asyncio.sleep(0)


def test_turns_come_with_news_and_no_sooner_than_the_interval() -> None:
    async def given_s() -> list[float]:
        moments = Moments()
        for number in range(10):
            await moments.ask(number, interval_s=2.5)
        return moments.given_s

    assert asyncio.run(given_s()) == [0, 3, 6, 9]


def test_news_after_which_nothing_comes_wait_for_two_intervals() -> None:
    async def given_s() -> list[float]:
        moments = Moments()
        await moments.ask(0.0, interval_s=2.0)
        await moments.ask(0.5, interval_s=2.0)
        await moments.ask(1.0, interval_s=2.0)
        await moments.pass_to(3.9)
        assert moments.given_s == [0]
        await moments.pass_to(4.1)
        await moments.pass_to(50.0)
        return moments.given_s

    assert asyncio.run(given_s()) == [0, 4.1]
