"""Token events become the same answer however they arrive and whenever they are taken."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from lockstep.core.request import Request
from lockstep.core.sampling import SamplingParams
from lockstep.core.step import SequenceEvent, TokenLogprob
from lockstep.engine.output import OutputProcessor, RequestStream
from lockstep.tokenizer.tokenizer import Tokenizer
from lockstep.tokenizer.vocabulary import Vocabulary

pytestmark = pytest.mark.suite("cpu", seconds=5)

PIECES = [
    b"a",
    b"b",
    b"ab",
    b" ",
    "\u00e9".encode(),
    "\u00e9".encode()[:1],
    "\u00e9".encode()[1:],
    b"END",
    b"</s>",
]
END_ID = len(PIECES) - 1
TOKENIZER = Tokenizer(
    None,  # type: ignore[arg-type]
    Vocabulary([piece.decode("latin-1") for piece in PIECES], lambda text: text.encode("latin-1"), frozenset()),
)


@dataclass
class Answer:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[int] = field(default_factory=list)
    endings: list[object] = field(default_factory=list)


def answer_by_definition(token_ids: Sequence[int], params: SamplingParams, ended_by: int | None) -> Answer:
    """The whole text at once, cut at the stop string that is complete after the fewest tokens."""
    shown = token_ids[:-1] if ended_by is not None and not params.include_stop else token_ids
    for count in range(params.min_tokens + 1, len(shown) + 1):
        # A character whose bytes are not all there is no text yet.
        text = b"".join(PIECES[i] for i in shown[:count]).decode("utf-8", "ignore")
        before = b"".join(PIECES[i] for i in shown[: params.min_tokens]).decode("utf-8", "ignore")
        found = [
            (at + len(stop), at, stop) for stop in params.stop if (at := text.find(stop, len(before))) >= 0
        ]
        if found:
            end, start, stop = min(found)
            cut = text[: end if params.include_stop else start]
            return Answer(cut, list(token_ids[:count]), list(token_ids[:count]), [("stop", stop)])
    text = b"".join(PIECES[i] for i in shown).decode("utf-8", "replace")
    ending = ("stop", ended_by) if ended_by is not None else ("length", None)
    return Answer(text, list(token_ids), list(token_ids), [ending])


def random_events(token_ids: Sequence[int], ended_by: int | None, draws: random.Random) -> list[SequenceEvent]:
    """One to three tokens a step; the last step says why the answer ended."""
    events, rest = [], list(token_ids)
    while rest:
        count = draws.randint(1, 3)
        taken, rest = tuple(rest[:count]), rest[count:]
        logprobs = tuple(TokenLogprob(token_id, -1.0, ()) for token_id in taken)
        events.append(SequenceEvent("r", 0, taken, logprobs))
    events[-1].finish_reason = "length" if ended_by is None else "stop"
    events[-1].stop_token_id = ended_by
    return events


@pytest.mark.parametrize("seed", range(8))
def test_an_answer_depends_neither_on_steps_nor_on_when_it_is_taken(seed: int) -> None:
    print("seed", seed)
    draws = random.Random(seed)
    num_cut = 0
    for _ in range(300):
        ended_by = END_ID if draws.random() < 0.5 else None
        token_ids = [draws.randrange(END_ID) for _ in range(draws.randint(1, 25))]
        if "\ufffd" in b"".join(PIECES[i] for i in token_ids).decode("utf-8", "replace"):
            token_ids = [i for i in token_ids if i not in (5, 6)] or [0]
        token_ids += [END_ID] if ended_by is not None else []
        stop = draws.choice([(), ("END",), ("ba", "a b"), ("aab", "b\u00e9", "END")])
        params = SamplingParams(
            stop=stop, include_stop=draws.random() < 0.5, min_tokens=draws.choice([0, 0, 3]), max_tokens=99
        )
        expected = answer_by_definition(token_ids, params, ended_by)
        num_cut += len(expected.token_ids) < len(token_ids)
        stream = RequestStream(Request(request_id="r", prompt_token_ids=(0,), params=params), TOKENIZER)
        found = Answer()
        for event in random_events(token_ids, ended_by, draws):
            stream.add(event)
            if draws.random() < 0.4:
                note(found, stream)
        note(found, stream)
        assert stream.take() is None
        assert found == expected, (token_ids, params, ended_by)
        assert stream.finished
    assert num_cut > 20


def note(found: Answer, stream: RequestStream) -> None:
    output = stream.take()
    if output is None:
        return
    (delta,) = output.deltas
    found.text += delta.text
    found.token_ids += delta.token_ids
    found.logprobs += [each.token_id for each in delta.logprobs]
    assert output.num_output_tokens == len(found.token_ids)
    if delta.finish_reason is not None:
        found.endings.append((delta.finish_reason, delta.matched_stop))


def test_choices_grow_side_by_side_and_an_ended_one_takes_no_more() -> None:
    params = SamplingParams(n=2, stop=("END",), max_tokens=9)
    stream = RequestStream(Request(request_id="r", prompt_token_ids=(0,) * 3, params=params), TOKENIZER)
    for index, token_id in [(0, 0), (1, 1), (0, 7), (0, 1)]:
        stream.add(SequenceEvent("r", index, (token_id,), num_cached_tokens=2))
    output = stream.take()
    assert output is not None and not output.finished and not stream.finished
    assert [(each.index, each.text, each.token_ids) for each in output.deltas] == [
        (0, "a", (0, 7)),
        (1, "b", (1,)),
    ]
    assert [each.finish_reason for each in output.deltas] == ["stop", None]
    assert (output.num_prompt_tokens, output.num_cached_tokens, output.num_output_tokens) == (3, 2, 3)
    stream.add(SequenceEvent("r", 0, (0,)))
    assert stream.take() is None
    stream.add(SequenceEvent("r", 1, (2,), finish_reason="length"))
    output = stream.take()
    assert output is not None and output.finished and stream.engine_unaware
    assert [(each.index, each.text) for each in output.deltas] == [(1, "ab")]


def test_what_is_told_of_a_prompt_goes_out_with_the_first_token_all_of_it() -> None:
    request = Request(request_id="r", prompt_token_ids=(0,) * 5, params=SamplingParams(prompt_logprobs=0))
    stream = RequestStream(request, TOKENIZER)
    told = tuple(TokenLogprob(0, -float(at), ()) for at in range(4))
    for part in (told[:2], (), told[2:]):
        stream.add(SequenceEvent("r", 0, (), prompt_logprobs=part, num_cached_tokens=1))
        assert stream.take() is None
    stream.add(SequenceEvent("r", 0, (1,)))
    output = stream.take()
    assert output is not None and output.prompt_logprobs == told and output.num_cached_tokens == 1
    assert [each.token_ids for each in output.deltas] == [(1,)]
    stream.add(SequenceEvent("r", 0, (), finish_reason="abort"))
    output = stream.take()
    assert output is not None and output.finished and output.prompt_logprobs == ()


def test_a_processor_gives_silent_requests_at_their_end_and_names_those_to_abort() -> None:
    processor = OutputProcessor(TOKENIZER)
    for name, stop in (("silent", ()), ("heard", ("END",))):
        params = SamplingParams(stop=stop, max_tokens=9)
        request = Request(request_id=name, prompt_token_ids=(0,), params=params)
        processor.add(request, at_once=name == "silent")

    def push(*token_ids: int, last: bool = False) -> tuple[list[tuple[str, str]], list[str]]:
        news = [SequenceEvent(name, 0, token_ids) for name in ("silent", "heard", "unknown")]
        news[0].finish_reason = "length" if last else None
        outputs, to_abort = processor.push(news)
        return [(each.request_id, each.deltas[0].text) for each in outputs], to_abort

    assert push(0) == ([("heard", "a")], [])
    assert push(7) == ([("heard", "")], ["heard"])
    assert push(2, last=True) == ([("silent", "aENDab")], [])
    assert len(processor) == 0
