"""From request bodies to core requests. Pure: of the engine it asks facts and a grammar check, nothing more."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.core.errors import InvalidRequest
from lockstep.core.request import Pooling, Request
from lockstep.core.sampling import Grammar, SamplingParams
from lockstep.engine.client import EngineClient
from lockstep.features.grammar import INVALID_GRAMMAR
from lockstep.server.schema.base import OpenAIFields, SamplingFields

_PLAIN_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "n",
    "include_stop",
    "ignore_eos",
    "skip_special_tokens",
)

SAMPLED_CHARACTERS_PER_TOKEN = 16
"""A text longer than the context times this is encoded in part first. Text has about 4 characters a token; what has
more than 16, such as a long run of blanks, is encoded whole."""

CUT_TOKENS = 256
"""More tokens than a cut in the middle of a word can add to what stands before it."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """A grammar and the field of the body that asked for it."""

    grammar: Grammar
    param: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as given and as ids. `text` is None when the client sent ids."""

    token_ids: tuple[int, ...]
    text: str | None = None


def new_id(prefix: str) -> str:
    """A fresh id such as ``cmpl-3f2c...``."""
    return f"{prefix}-{uuid.uuid4().hex}"


def sampling_params(fields: SamplingFields, *, grammar: Grammar | None = None, **given: Any) -> SamplingParams:
    """The sampling parameters that `fields` and the keywords ask for; None keeps core's default.

    Raises InvalidRequest naming the field.
    """
    chosen: dict[str, Any] = {name: getattr(fields, name) for name in _PLAIN_FIELDS} | given
    chosen |= {
        "stop": tuple(fields.stop or ()),
        "stop_token_ids": tuple(fields.stop_token_ids or ()),
        "logit_bias": _logit_bias(fields.logit_bias or {}),
        "grammar": grammar,
    }
    return SamplingParams(**{name: value for name, value in chosen.items() if value is not None})


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token_id): bias for token_id, bias in given.items()}
    except ValueError:
        raise InvalidRequest('logit_bias maps token ids such as "42" to numbers', param="logit_bias") from None


def requested_constraint(fields: SamplingFields) -> Constraint | None:
    """The one constraint that the body asks for. Raises InvalidRequest when it asks for two."""
    found: dict[str, Grammar] = {}
    if fields.regex is not None:
        found["regex"] = Grammar("regex", fields.regex)
    if fields.ebnf is not None:
        found["ebnf"] = Grammar("ebnf", fields.ebnf)
    if fields.json_schema is not None:
        schema = fields.json_schema
        found["json_schema"] = Grammar("json_schema", schema if isinstance(schema, str) else json.dumps(schema))
    shape = fields.response_format if isinstance(fields, OpenAIFields) else None
    if shape is not None and shape.json_schema is not None:
        found["response_format"] = Grammar("json_schema", json.dumps(shape.json_schema.schema_))
    elif shape is not None and shape.type == "json_object":
        found["response_format"] = Grammar("json_object")
    if len(found) > 1:
        names = " and ".join(found)
        raise InvalidRequest(f"{names} exclude each other; give one of them", param=list(found)[-1])
    return next((Constraint(grammar, param) for param, grammar in found.items()), None)


def check_constraint(client: EngineClient, constraint: Constraint | None) -> None:
    """Compiles and tries the grammar, which may take a while. Raises InvalidRequest naming the field."""
    if constraint is None:
        return
    try:
        client.validate_grammar(constraint.grammar)
    except InvalidRequest as error:
        raise InvalidRequest(str(error), param=constraint.param, code=INVALID_GRAMMAR) from None


def encode_prompt(
    client: EngineClient, prompt: str | Sequence[int], *, add_special_tokens: bool, param: str
) -> Prompt:
    """Ids of one prompt. Raises InvalidRequest when it is empty or holds an id that the model does not have."""
    if isinstance(prompt, str):
        _refuse_far_too_long(client, prompt, param)
        found = Prompt(tuple(client.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)), prompt)
    else:
        found = Prompt(tuple(prompt))
    # Those of a text, too: a tokenizer may have more ids than the model has embeddings.
    check_token_ids(client, found.token_ids, param)
    if not found.token_ids:
        raise InvalidRequest(f"{param} is empty; it needs at least one token", param=param)
    return found


def _refuse_far_too_long(client: EngineClient, text: str, param: str) -> None:
    """Encodes the beginning of a very long text. Raises InvalidRequest when that is over the context already."""
    limit = client.card.context_length
    num_sampled = SAMPLED_CHARACTERS_PER_TOKEN * limit
    if len(text) <= num_sampled:
        return
    num_tokens = len(client.tokenizer.encode(text[:num_sampled], add_special_tokens=False))
    if num_tokens > limit + CUT_TOKENS:
        raise InvalidRequest(
            f"the prompt has {len(text)} characters, of which the first {num_sampled} are {num_tokens} tokens "
            f"already; this model's context holds {limit}, answer included",
            param=param,
            code="context_length_exceeded",
        )


def check_token_ids(client: EngineClient, token_ids: Sequence[int], param: str) -> None:
    """Raises InvalidRequest for the first id outside the vocabulary."""
    vocab_size = client.card.vocab_size
    wrong = next((token_id for token_id in token_ids if not 0 <= token_id < vocab_size), None)
    if wrong is not None:
        raise InvalidRequest(
            f"token id {wrong} is out of range; this model has 0 to {vocab_size - 1}", param=param
        )


def make_request(
    client: EngineClient,
    request_id: str,
    prompt: Prompt,
    params: SamplingParams,
    *,
    prompt_param: str,
    max_tokens_param: str = "max_tokens",
    priority: int | None = None,
    deadline_s: float | None = None,
    pooling: Pooling | None = None,
) -> Request:
    """A request that fits this model. Raises InvalidRequest when prompt and answer exceed its context."""
    if params.stop:
        client.tokenizer.require_text("a stop string")
    num_prompt, limit = len(prompt.token_ids), client.card.context_length
    num_new = 0 if pooling else 1
    if num_prompt + num_new > limit:
        raise InvalidRequest(
            f"the prompt has {num_prompt} tokens; this model's context holds {limit}, answer included",
            param=prompt_param,
            code="context_length_exceeded",
        )
    if params.max_tokens is not None and num_prompt + params.max_tokens > limit:
        raise InvalidRequest(
            f"{max_tokens_param} {params.max_tokens} and the prompt's {num_prompt} tokens exceed the model's "
            f"context of {limit}; ask for at most {limit - num_prompt}",
            param=max_tokens_param,
            code="context_length_exceeded",
        )
    check_token_ids(client, params.stop_token_ids, "stop_token_ids")
    check_token_ids(client, tuple(params.logit_bias), "logit_bias")
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt.token_ids,
        params=params,
        priority=priority or 0,
        deadline_s=deadline_s,
        pooling=pooling,
    )
