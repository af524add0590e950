"""What sampling parameters mean, seen through `LLM` with the embedded model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from lockstep.core.sampling import SamplingParams
from lockstep.engine.llm import LLM, Completion

pytestmark = pytest.mark.suite("cpu")

ONE_THREAD: dict[str, Any] = {"threads": 1}
PROMPT = "Here is a short story about a fox and a hen. One day"
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=1)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**ONE_THREAD, max_total_tokens=4096) as opened:
        yield opened


@pytest.fixture(scope="module")
def exact() -> Iterator[LLM]:
    """In float32: prompts have the scores of steps of single tokens, and every processor writes the same text."""
    with LLM(**ONE_THREAD, dtype="float32", max_total_tokens=4096) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain(llm: LLM) -> Completion:
    """The answer without any of the restrictions below."""
    (answer,) = llm.generate([PROMPT], GREEDY)
    print(repr(answer.text))
    return answer


def ask(llm: LLM, **changed: object) -> Completion:
    return llm.generate([PROMPT], replace(GREEDY, **changed))[0]  # type: ignore[arg-type]


def test_max_tokens_is_reached_exactly(llm: LLM, plain: Completion) -> None:
    assert len(plain.token_ids) == len(plain.logprobs) == 40 and plain.finish_reason == "length"
    for count in (1, 2, 17):
        answer = ask(llm, max_tokens=count)
        assert answer.token_ids == plain.token_ids[:count] and answer.finish_reason == "length"
        assert answer.text == llm.tokenizer.decode(plain.token_ids[:count])


def test_the_context_length_ends_an_answer() -> None:
    with LLM(**ONE_THREAD, max_total_tokens=256, context_length=32) as short:
        answer = short.generate([PROMPT], SamplingParams(temperature=0.0, ignore_eos=True))[0]
    assert len(answer.prompt_token_ids) + len(answer.token_ids) == 32
    assert answer.finish_reason == "length"


@pytest.mark.parametrize("first", [3, 20, 61])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text_where_it_begins(
    llm: LLM, plain: Completion, first: int, include: bool
) -> None:
    """Any seven characters, mostly parts of two or three tokens."""
    stop = plain.text[first : first + 7]
    end = plain.text.index(stop)
    answer = ask(llm, stop=("never said", stop), include_stop=include)
    assert answer.text == plain.text[: end + len(stop) * include]
    assert answer.finish_reason == "stop" and answer.choices[0].matched_stop == stop
    assert answer.token_ids == plain.token_ids[: len(answer.token_ids)]
    assert len(answer.logprobs) == len(answer.token_ids) < 40
    assert stop in llm.tokenizer.decode(answer.token_ids)
    assert stop not in llm.tokenizer.decode(answer.token_ids[:-1])
    assert llm.stats().num_running == 0


def test_the_first_stop_string_in_the_text_wins(llm: LLM, plain: Completion) -> None:
    early, late = plain.text[10:14], plain.text[50:58]
    answer = ask(llm, stop=(late, early))
    assert answer.choices[0].matched_stop == early and answer.text == plain.text[: plain.text.index(early)]


def test_a_stop_id_is_counted_but_not_written(llm: LLM, plain: Completion) -> None:
    stop_id = plain.token_ids[9]
    end = plain.token_ids.index(stop_id)
    answer = ask(llm, stop_token_ids=(stop_id,))
    assert answer.token_ids == plain.token_ids[: end + 1]
    assert answer.text == llm.tokenizer.decode(plain.token_ids[:end])
    assert answer.finish_reason == "stop" and answer.choices[0].matched_stop == stop_id
    included = ask(llm, stop_token_ids=(stop_id,), include_stop=True)
    assert included.text == llm.tokenizer.decode(plain.token_ids[: end + 1])


def test_min_tokens_holds_stops_back(llm: LLM, plain: Completion) -> None:
    stop_id = plain.token_ids[4]
    answer = ask(llm, stop_token_ids=(stop_id,), min_tokens=12)
    assert stop_id not in answer.token_ids[:12] and len(answer.token_ids) >= 12
    eager = ask(llm, stop_token_ids=(stop_id,), min_tokens=12, logit_bias={stop_id: 100.0})
    assert stop_id not in eager.token_ids[:12] and eager.token_ids[12:] == (stop_id,)
    word = plain.text[10:15]
    late = ask(llm, stop=(word,), min_tokens=30)
    assert word in late.text and late.token_ids[:30] == plain.token_ids[:30]


def test_the_end_token_ends_an_answer_unless_ignored(exact: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=30)
    (end,) = exact.card.eos_token_ids
    answer = exact.chat(QUESTION, params)
    assert answer.token_ids[-1] == end and answer.finish_reason == "stop"
    assert answer.choices[0].matched_stop == end
    assert answer.text == "The capital of France is Paris."
    onward = exact.chat(QUESTION, replace(params, ignore_eos=True))
    assert onward.finish_reason == "length" and len(onward.token_ids) == 30
    assert onward.token_ids[: len(answer.token_ids)] == answer.token_ids
    assert "<|im_end|>" not in onward.text
    spelled = exact.chat(QUESTION, replace(params, ignore_eos=True, skip_special_tokens=False))
    assert "Paris.<|im_end|>" in spelled.text
    longer = exact.chat(QUESTION, replace(params, min_tokens=20))
    assert len(longer.token_ids) >= 20 and end not in longer.token_ids[:20]


def test_logit_bias_forces_and_forbids(llm: LLM, plain: Completion) -> None:
    wanted, unwanted = 1234, plain.token_ids[0]
    forced = ask(llm, logit_bias={wanted: 100.0}, max_tokens=5)
    assert forced.token_ids == (wanted,) * 5
    forbidden = ask(llm, logit_bias={unwanted: -100.0})
    assert unwanted not in forbidden.token_ids
    assert forbidden.token_ids[0] == runner_up(llm)


def runner_up(llm: LLM) -> int:
    return ask(llm, max_tokens=1, logprobs=2).logprobs[0].top[1][0]


def test_logprobs_are_the_models_own(llm: LLM, plain: Completion) -> None:
    """Bias, penalties and temperature change what is chosen, not what is reported for the same context."""
    (first,) = ask(llm, max_tokens=1, logprobs=5).logprobs
    assert first.token_id == first.top[0][0] and first.logprob == first.top[0][1]
    assert [value for _, value in first.top] == sorted((value for _, value in first.top), reverse=True)
    changed = ask(
        llm,
        max_tokens=1,
        logprobs=5,
        temperature=3.0,
        top_k=4,
        seed=1,
        repetition_penalty=1.5,
        logit_bias={first.top[2][0]: 50.0},
    ).logprobs[0]
    assert changed.token_id == first.top[2][0]
    assert changed.logprob == pytest.approx(first.top[2][1], abs=1e-6) and changed.top == first.top


def test_logprobs_none_and_zero(llm: LLM) -> None:
    assert ask(llm, max_tokens=2, logprobs=None).logprobs == ()
    zero = ask(llm, max_tokens=2, logprobs=0).logprobs
    assert len(zero) == 2 and all(scored.top == () for scored in zero)


def test_prompt_logprobs_describe_every_prompt_token_but_the_first(exact: LLM) -> None:
    answer = ask(exact, prompt_logprobs=3, max_tokens=1)
    scored = answer.prompt_logprobs
    assert tuple(one.token_id for one in scored) == answer.prompt_token_ids[1:]
    assert all(len(one.top) == 3 and one.logprob <= one.top[0][1] for one in scored)
    # What was generated before is now a prompt: the same tokens have the same log-probabilities.
    generated = ask(exact, max_tokens=12)
    known = (*generated.prompt_token_ids, *generated.token_ids)
    again = exact.generate([known], replace(GREEDY, max_tokens=1, prompt_logprobs=0))[0].prompt_logprobs
    for one, other in zip(again[-12:], generated.logprobs, strict=True):
        assert one.token_id == other.token_id
        assert one.logprob == pytest.approx(other.logprob, abs=5e-4)


def test_requests_without_a_seed_draw_from_the_engines(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=12)

    def texts(seed: int) -> list[str]:
        with LLM(**ONE_THREAD, max_total_tokens=1024, seed=seed) as fresh:
            return [answer.text for answer in fresh.generate([PROMPT] * 3, params)]

    first = texts(5)
    assert len(set(first)) == 3, "requests must not share a seed"
    assert texts(5) == first != texts(6)


def test_n_choices(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=3, n=4, max_tokens=10, logprobs=0)
    answer = llm.generate([PROMPT], params)[0]
    assert len(answer.choices) == 4 and len({choice.text for choice in answer.choices}) == 4
    assert all(len(choice.logprobs) == len(choice.token_ids) for choice in answer.choices)
    assert llm.generate([PROMPT], params)[0].choices == answer.choices


def test_a_stop_string_of_one_choice_leaves_the_others_alone(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=3, n=4, max_tokens=24)
    whole = llm.generate([PROMPT], params)[0]
    stop = whole.choices[2].text[20:32]
    assert [stop in choice.text for choice in whole.choices].count(True) == 1
    stopped = llm.generate([PROMPT], replace(params, stop=(stop,)))[0]
    for choice, unstopped in zip(stopped.choices, whole.choices, strict=True):
        assert choice.text == unstopped.text.split(stop)[0]
    assert stopped.choices[2].matched_stop == stop
