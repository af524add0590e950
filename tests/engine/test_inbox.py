"""Outputs on their way to a reader: nothing lost, nothing out of order, errors last."""

from __future__ import annotations

import asyncio
import time

import pytest

from lockstep.core.errors import EngineDead
from lockstep.core.output import CompletionDelta, RequestOutput, merged
from lockstep.core.step import TokenLogprob
from lockstep.engine.inbox import EVENTS_PER_S, EVENTS_PER_S_ON_HOST, Inbox

pytestmark = pytest.mark.suite("cpu", seconds=1)


def output(number: int, *, index: int = 0, finished: bool = False) -> RequestOutput:
    logprob = TokenLogprob(number, -1.0, ())
    delta = CompletionDelta(index, f"<{number}>", (number,), (logprob,), "stop" if finished else None)
    return RequestOutput("r", (delta,), 3, 1, number, finished)


def test_merging_keeps_every_token_of_every_choice() -> None:
    whole = merged([output(1), output(2, index=1), output(3), output(4, index=1, finished=True)])
    assert [(delta.index, delta.text, delta.token_ids) for delta in whole.deltas] == [
        (0, "<1><3>", (1, 3)),
        (1, "<2><4>", (2, 4)),
    ]
    assert [each.token_id for each in whole.deltas[1].logprobs] == [2, 4]
    assert [delta.finish_reason for delta in whole.deltas] == [None, "stop"]
    assert (whole.num_output_tokens, whole.finished) == (4, True)
    assert merged([output(1)]) == output(1)


def test_what_came_meanwhile_is_one_output_and_the_error_comes_last() -> None:
    async def read() -> list[str]:
        inbox = Inbox(EVENTS_PER_S)
        inbox.put(output(1))
        texts = [(await inbox.next(1)).deltas[0].text]
        for number in (2, 3):
            inbox.put(output(number))
        inbox.put(EngineDead("gone"))
        texts.append((await inbox.next(1)).deltas[0].text)
        with pytest.raises(EngineDead, match="gone"):
            await inbox.next(1)
        return texts

    assert asyncio.run(read()) == ["<1>", "<2><3>"]


@pytest.mark.parametrize("events_per_s", [EVENTS_PER_S, EVENTS_PER_S_ON_HOST])
def test_readers_take_turns_but_first_and_last_do_not_wait(events_per_s: int) -> None:
    readers = events_per_s // 5

    async def read() -> list[float]:
        inbox, times = Inbox(events_per_s), []
        for news in (output(1), output(2), output(3, finished=True)):
            inbox.put(news)
            begin_s = time.monotonic()
            await inbox.next(readers)
            times.append(time.monotonic() - begin_s)
        return times

    first, second, last = asyncio.run(read())
    assert second >= 0.9 * readers / events_per_s
    assert max(first, last) < 0.5 * readers / events_per_s
