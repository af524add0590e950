"""What cannot work is refused before anything runs, by the name of the field, and leaves nothing behind."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_llm import make_tiny, open_tiny
from tokenizers import AddedToken, Tokenizer

from lockstep.core.errors import ConfigError, InvalidRequest, LockstepError, ModelFileError
from lockstep.core.sampling import Grammar, SamplingParams
from lockstep.engine.llm import LLM
from lockstep.server.schema.chat import Role
from lockstep.tokenizer.conversation import ROLES

pytestmark = pytest.mark.suite("cpu")

CONTEXT = 64
GOOD = [5, 6, 7]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = tmp_path_factory.mktemp("llama")
    make_tiny(path)
    with open_tiny(path, context_length=CONTEXT, max_total_tokens=128) as opened:
        yield opened


def test_text_that_spells_a_token_beyond_the_vocabulary(tmp_path: Path) -> None:
    """A tokenizer may have more ids than the model has embeddings."""
    make_tiny(tmp_path)
    file = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens([AddedToken(f"<|{number}|>", special=True) for number in range(5)])
    tokenizer.save(str(file))
    with open_tiny(tmp_path) as llm:
        last = llm.card.vocab_size - 1
        assert tokenizer.token_to_id("<|4|>") > last
        with pytest.raises(InvalidRequest, match=f"is not one of 0 to {last}"):
            llm.generate(["hello <|4|>"])
        assert llm.generate(["hello"], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "n_layer": 2}, "architecture GPT2LMHeadModel is not supported"),
        ({"architectures": ["LlamaForCausalLM"], "hidden_size": "64"}, "lacks a positive 'num_hidden_layers'"),
    ],
)
def test_configs_of_other_models(config: dict[str, Any], problem: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"wte.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match=problem):
        LLM(str(tmp_path))


def test_contexts_that_only_another_attention_reaches(tmp_path: Path) -> None:
    make_tiny(tmp_path, max_position_embeddings=4096)
    file = tmp_path / "config.json"
    dual_chunk = {"dual_chunk_attention_config": {"original_max_position_embeddings": 512}}
    file.write_text(json.dumps(json.loads(file.read_text()) | dual_chunk))
    with open_tiny(tmp_path) as llm:
        assert llm.card.context_length == 512


@pytest.fixture(scope="module")
def conversing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = tmp_path_factory.mktemp("chat")
    make_tiny(path)
    template = path / "short.jinja"
    template.write_text("{% for message in messages %}{{ message.role }}:{{ message.content }};{% endfor %}")
    with open_tiny(path, chat_template=str(template)) as opened:
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
        ({"stop": ""}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop_token_ids": -1}, "stop_token_ids"),
        ({"stop_token_ids": True}, "stop_token_ids"),
        ({"stop_token_ids": (1, True)}, "stop_token_ids"),
        ({"logit_bias": [3]}, "logit_bias"),
        ({"logit_bias": {True: 1.0}}, "logit_bias"),
        ({"grammar": "[0-9]+"}, "grammar"),
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SamplingParams(temprature=1), "no field 'temprature'; did you mean 'temperature'"),  # type: ignore[call-arg]
        (lambda: replace(SamplingParams(), max_token=1), "no field 'max_token'; did you mean 'max_tokens'"),
        (lambda: SamplingParams(grammar="[0-9]+"), r"such as Grammar\('regex', '\[0-9\]\+'\), not"),  # type: ignore[arg-type]
        (
            lambda: Grammar("regexp", "a"),
            "json_schema, json_object, regex, ebnf, not 'regexp'; did you mean 'regex'",
        ),  # type: ignore[arg-type]
        (lambda: Grammar("json_schema", {"type": "object"}), r"is text, not dict: pass json\.dumps\(schema\)"),  # type: ignore[arg-type]
        (lambda: SamplingParams(top_p=0.0), "top_p must be above 0 and at most 1, not 0.0"),
    ],
)
def test_what_is_misspelt_is_told_what_is_right(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make()


def test_one_stop_is_as_good_as_a_list_of_one() -> None:
    one = SamplingParams(stop="numbers", stop_token_ids=7)  # type: ignore[arg-type]
    assert one == SamplingParams(stop=("numbers",), stop_token_ids=(7,))
    assert one == SamplingParams(stop=["numbers"], stop_token_ids=[7])  # type: ignore[arg-type]
    assert one == pickle.loads(pickle.dumps(one)) == replace(one)


def test_integers_of_numpy_and_torch_are_integers(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logit_bias={9: 5.0})
    (expected, twin) = llm.generate([GOOD, GOOD], params)
    assert expected == twin
    array, tensor = np.array(GOOD), torch.tensor(GOOD)
    for prompt in (array, tensor, list(array), list(tensor), array.astype(np.uint8)):
        (found,) = llm.generate(prompt, params)  # type: ignore[arg-type]
        assert found == expected and all(type(token) is int for token in found.prompt_token_ids)
    for prompts in (np.stack([array, array]), torch.stack([tensor, tensor]), [array, tensor]):
        assert llm.generate(prompts, params) == [expected, expected]  # type: ignore[arg-type]
    bias: dict[int, float] = {np.int64(9): 5.0}  # type: ignore[dict-item]
    assert SamplingParams(stop_token_ids=array[:1], logit_bias=bias, top_k=tensor[0]) == SamplingParams(
        stop_token_ids=(5,), logit_bias={9: 5.0}, top_k=5
    )
    for wrong in (np.array([1.0]), torch.tensor([1.5]), [1.0, 2], [True, 1], 7.5):
        with pytest.raises(InvalidRequest):
            llm.generate(wrong)  # type: ignore[arg-type]


def test_an_answer_longer_than_what_fits_is_refused_with_the_numbers(llm: LLM) -> None:
    room = CONTEXT - len(GOOD)
    with pytest.raises(
        InvalidRequest, match=f"max_tokens {room + 1} .* prompt's 3 tokens.* at most {room}$"
    ) as no:
        llm.generate([GOOD], SamplingParams(max_tokens=room + 1))
    assert (no.value.param, no.value.code) == ("max_tokens", "context_length_exceeded")
    for fitting in (room, None):
        answer = llm.generate([GOOD], SamplingParams(max_tokens=fitting, ignore_eos=True, seed=1))[0]
        assert (len(answer.token_ids), answer.finish_reason) == (room, "length")


def test_params_must_match_the_prompts(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="2 prompts were given with 1 params"):
        llm.generate([GOOD, GOOD], [SamplingParams()])


@pytest.mark.parametrize(
    ("call", "message", "param"),
    [
        (
            lambda llm: llm.generate([GOOD], {"max_tokens": 3}),
            r"SamplingParams, not \{'max_tokens': 3\}",
            "params",
        ),
        (lambda llm: llm.generate([GOOD], [{"seed": 1}]), r"SamplingParams, not \{'seed': 1\}", "params"),
        (lambda llm: llm.stream(GOOD, 3), "SamplingParams, not 3", "params"),
        (lambda llm: llm.generate(3), "a prompt is text or token ids, not 3", "prompt"),
        (lambda llm: llm.generate(None), "a prompt is text or token ids, not None", "prompt"),
        (lambda llm: llm.embed(7, "last"), "a prompt is text or token ids, not 7", "prompt"),
        (lambda llm: llm.embed([GOOD], "men"), "one of mean, last, not 'men'; did you mean 'mean'", "pooling"),
    ],
)
def test_what_is_of_another_kind(llm: LLM, call: Callable[[LLM], object], message: str, param: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        call(llm)
    assert caught.value.param == param
    assert llm.stats().num_waiting == 0


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


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("Hello", "messages"),
        ({"role": "user", "content": "Hello"}, "messages"),
        (["Hello"], "messages[0]"),
        ([{"content": "Hello"}], "messages[0].role"),
        ([{"role": "user", "content": "Hello"}, {"role": "boss", "content": "Work!"}], "messages[1].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
    ],
)
def test_conversations(conversing: LLM, messages: Any, param: str) -> None:
    for ask in (conversing.chat, conversing.stream_chat):
        with pytest.raises(InvalidRequest, match="messages") as caught:
            ask(messages)
        assert caught.value.param == param


def test_roles_are_those_of_the_http_interface(conversing: LLM) -> None:
    assert get_args(Role) == ROLES
    params = SamplingParams(max_tokens=1)
    said = [{"role": role, "content": "x"} for role in ROLES]
    answer = conversing.chat([*said, {"role": "assistant"}], params)
    shown = conversing.tokenizer.decode(answer.prompt_token_ids)
    assert shown == "system:x;system:x;user:x;assistant:x;tool:x;tool:x;assistant:;"


def test_a_broken_chat_template_is_named_when_the_model_opens(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    template = tmp_path / "mine.jinja"
    template.write_text("{% if %}")
    with pytest.raises(ModelFileError, match=r"^--chat-template .*mine\.jinja is broken at line 1: "):
        open_tiny(tmp_path, chat_template=str(template))
    template.write_text("{{ messages + 1 }}")
    refused = pytest.raises(InvalidRequest, match=r"^--chat-template .*mine\.jinja cannot render")
    with open_tiny(tmp_path, chat_template=str(template)) as opened, refused:
        opened.chat([{"role": "user", "content": "Hello"}])


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
