"""What cannot work is refused before anything runs, by the name of the field, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_llm import make_tiny, open_tiny

from lockstep.core.errors import ConfigError, InvalidRequest, LockstepError, ModelFileError
from lockstep.core.sampling import Grammar, SamplingParams
from lockstep.engine.llm import LLM

pytestmark = pytest.mark.suite("cpu")

CONTEXT = 64
GOOD = [5, 6, 7]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = tmp_path_factory.mktemp("llama")
    make_tiny(path)
    with open_tiny(path, context_length=CONTEXT, max_total_tokens=128) as opened:
        yield opened


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": float("inf")}, "min_p"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"logit_bias": {3: 101.0}}, "logit_bias"),
        ({"logit_bias": {-3: 1.0}}, "logit_bias"),
        ({"logit_bias": {260: 1.0}}, "logit_bias"),
        ({"seed": 2**64}, "seed"),
        ({"n": 0}, "n"),
        ({"stop": ("",)}, "stop"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ],
)
def test_sampling_values(llm: LLM, changed: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        llm.generate([GOOD], SamplingParams(**changed))
    assert caught.value.param == param
    assert param in str(caught.value) or "token id" in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "is empty"),
        ("", "is empty"),
        ([1, 260], "token id 260 is not one of 0 to 259"),
        ([1, -1], "token id -1"),
        ([1, True], "token id True"),
        ([1, 2.0], "token id 2.0"),
        ([1] * CONTEXT, f"has {CONTEXT} tokens, but the context length"),
        ("half a pair: \ud83e", "surrogate"),
    ],
)
def test_prompts(llm: LLM, prompt: Any, message: str) -> None:
    """Refused although a good prompt comes first, which must not have run."""
    before = llm.stats()
    calls: list[Callable[[], object]] = [
        lambda: llm.generate([GOOD, prompt]),
        lambda: llm.stream(prompt),
    ]
    for call in calls:
        with pytest.raises(InvalidRequest, match=message) as caught:
            call()
        assert caught.value.param in ("prompt", None)
    after = llm.stats()
    assert (after.num_steps, after.num_waiting, after.num_running) == (before.num_steps, 0, 0)


def test_params_must_match_the_prompts(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="2 prompts were given with 1 params"):
        llm.generate([GOOD, GOOD], [SamplingParams()])


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", "{"),
        Grammar("json_schema", '{"type": "nonsense"}'),
        Grammar("regex", "("),
        Grammar("ebnf", "root ::= missing"),
    ],
)
def test_broken_grammars(llm: LLM, grammar: Grammar) -> None:
    with pytest.raises(InvalidRequest):
        llm.generate([GOOD], SamplingParams(grammar=grammar))
    assert llm.stats().num_running == 0


def test_a_prompt_for_an_embedding_may_fill_the_context(llm: LLM) -> None:
    assert len(llm.embed([[1] * CONTEXT], "last")) == 1
    with pytest.raises(InvalidRequest, match="context length"):
        llm.embed([[1] * (CONTEXT + 1)], "last")


def test_a_request_that_fails_while_it_runs_leaves_the_others(llm: LLM) -> None:
    """The grammar wants an x that the bias forbids: no token is left."""
    grammar = Grammar("regex", "x+")
    blocked = SamplingParams(grammar=grammar, logit_bias={llm.tokenizer.encode("x")[0]: -100.0}, max_tokens=4)
    answer = llm.generate([GOOD], blocked)[0]
    assert set(answer.text) == {"x"}, "a bias of -100 is large but finite"
    never = SamplingParams(grammar=grammar, min_tokens=4, stop_token_ids=tuple(llm.tokenizer.encode("x")))
    with pytest.raises(LockstepError, match="generation failed: no token is allowed here"):
        llm.generate([GOOD], never)
    assert llm.generate([GOOD], SamplingParams(max_tokens=2))[0].finish_reason in ("length", "stop")
    assert llm.stats().num_running == 0 and llm.stats().num_pages_in_use == 0


def test_no_chat_template(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        llm.chat([{"role": "user", "content": "Hello"}])


def test_options_and_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype"):
        LLM(dtyp="float32")
    with pytest.raises(ConfigError, match="page_size"):
        LLM(page_size=0)
    with pytest.raises(ModelFileError, match="no such directory"):
        LLM(str(tmp_path / "nowhere.gguf"))
    make_tiny(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
        open_tiny(tmp_path)
