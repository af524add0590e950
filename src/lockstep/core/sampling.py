"""What a request may ask of the sampler, checked once when it is made."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lockstep.core.errors import InvalidRequest, nearest

MAX_LOGPROBS = 20
MAX_CHOICES = 128
_LARGEST = 2**31 - 1
"""Of integers without a limit of their own: what every part of an engine holds."""
MAX_STOP_STRINGS = 16

GrammarKind = Literal["json_schema", "json_object", "regex", "ebnf"]
GRAMMAR_KINDS: tuple[GrammarKind, ...] = get_args(GrammarKind)


def as_integer(value: object) -> int | None:
    """The integer that `value` is, be it Python's own, numpy's or torch's; None for True, False and the rest."""
    if isinstance(value, bool) or getattr(value, "ndim", None):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint on the generated text.

    `source` is a JSON schema as text for ``json_schema``, a regular expression for ``regex``, a GBNF or Lark
    grammar for ``ebnf``, and empty for ``json_object``. Raises InvalidRequest for an unknown kind and for a source
    that is no text.
    """

    kind: GrammarKind
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in GRAMMAR_KINDS:
            raise InvalidRequest(
                f"a grammar's kind is one of {', '.join(GRAMMAR_KINDS)}, not {self.kind!r}"
                f"{nearest(str(self.kind), GRAMMAR_KINDS)}",
                param="grammar",
            )
        if not isinstance(self.source, str):
            remedy = ": pass json.dumps(schema)" if self.kind == "json_schema" else ""
            raise InvalidRequest(
                f"the source of a grammar is text, not {type(self.source).__name__}{remedy}", param="grammar"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next tokens of one request are chosen and when generation ends.

    `temperature` 0 is greedy. `top_k` 0 or -1, `top_p` 1 and `min_p` 0 switch those filters off. Presence and
    frequency penalties count generated tokens only; the repetition penalty counts the prompt too. `seed` with a
    position decides a draw completely, whatever shares the batch. `max_tokens` None means what fits in the context
    length; a number that does not fit beside the prompt is refused. `stop` and `stop_token_ids` take several or a
    single one, and keep a tuple. `logprobs` k returns the chosen token's and the k best log-probabilities (natural
    log, after penalties, bias and temperature are *not* applied: the model's own distribution). Integers of numpy
    and torch are taken as Python's.

    Raises InvalidRequest naming the field, for a field that does not exist with the nearest one.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    grammar: Grammar | None = None

    def __new__(cls, **given: Any) -> SamplingParams:
        for name in given:
            if name not in cls.__dataclass_fields__:
                hint = nearest(name, cls.__dataclass_fields__)
                raise InvalidRequest(f"SamplingParams has no field {name!r}{hint}", param=name)
        # Not super(): with slots, this class is not the one that the dataclass ends up as.
        return object.__new__(cls)

    def __post_init__(self) -> None:
        number = self._number
        number("temperature", 0.0, 100.0)
        number("top_p", 0.0, 1.0, open_low=True)
        number("min_p", 0.0, 1.0)
        number("presence_penalty", -2.0, 2.0)
        number("frequency_penalty", -2.0, 2.0)
        number("repetition_penalty", 0.01, 100.0)  # less, and scores would overflow
        integer = self._integer
        integer("top_k", -1)
        integer("n", 1, MAX_CHOICES)
        integer("min_tokens", 0)
        integer("max_tokens", 1, optional=True)
        integer("logprobs", 0, MAX_LOGPROBS, optional=True)
        integer("prompt_logprobs", 0, MAX_LOGPROBS, optional=True)
        integer("seed", -(2**63), 2**64 - 1, optional=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}", param="min_tokens"
            )
        self._stops()
        self._biases()
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise InvalidRequest(
                "grammar takes a Grammar(kind, source), such as Grammar('regex', '[0-9]+'), "
                f"not {self.grammar!r:.60}",
                param="grammar",
            )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _stops(self) -> None:
        self._set("stop", (self.stop,) if isinstance(self.stop, str) else _tuple_of(self.stop, "stop"))
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"stop takes at most {MAX_STOP_STRINGS} strings", param="stop")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InvalidRequest(f"stop takes non-empty strings, not {text!r}", param="stop")
        single = as_integer(self.stop_token_ids)
        several = _tuple_of(self.stop_token_ids, "stop_token_ids") if single is None else (single,)
        token_ids = tuple(map(as_integer, several))
        if any(token_id is None or token_id < 0 for token_id in token_ids):
            raise InvalidRequest("stop_token_ids takes token ids (integers from 0)", param="stop_token_ids")
        self._set("stop_token_ids", token_ids)

    def _biases(self) -> None:
        shape = InvalidRequest("logit_bias maps token ids (integers from 0) to numbers", param="logit_bias")
        if not isinstance(self.logit_bias, Mapping):
            raise shape
        biases: dict[int, float] = {}
        for written, bias in self.logit_bias.items():
            token_id = as_integer(written)
            if token_id is None or token_id < 0:
                raise shape
            if not isinstance(bias, (int, float)) or math.isnan(bias) or not -100.0 <= bias <= 100.0:
                raise InvalidRequest("logit_bias values lie between -100 and 100", param="logit_bias")
            biases[token_id] = bias
        self._set("logit_bias", biases)

    def _number(self, name: str, low: float, high: float, *, open_low: bool = False) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise InvalidRequest(f"{name} must be a finite number, not {value!r}", param=name)
        if value < low or value > high or (open_low and value == low):
            span = f"be above {low:g} and at most {high:g}" if open_low else f"lie from {low:g} to {high:g}"
            raise InvalidRequest(f"{name} must {span}, not {value!r}", param=name)

    def _integer(self, name: str, low: int, high: int = _LARGEST, *, optional: bool = False) -> None:
        given = getattr(self, name)
        if given is None and optional:
            return
        value = as_integer(given)
        if value is None:
            raise InvalidRequest(f"{name} must be an integer, not {given!r}", param=name)
        if not low <= value <= high:
            is_open = high == _LARGEST and value < low
            limit = f"at least {low}" if is_open else f"from {low} to {high}"
            raise InvalidRequest(f"{name} must be {limit}, not {value}", param=name)
        self._set(name, value)

    def with_seed(self, seed: int) -> SamplingParams:
        """The same with this seed, from 0 to 2**64 - 1, without checking once more what has been checked."""
        seeded = copy(self)
        object.__setattr__(seeded, "seed", seed)
        return seeded

    @property
    def greedy(self) -> bool:
        """True when the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """True when the choice depends on which tokens came before."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)


def _tuple_of(several: Any, name: str) -> tuple[Any, ...]:
    try:
        return tuple(several)
    except TypeError:
        raise InvalidRequest(f"{name} takes one or a list of them, not {several!r}", param=name) from None
