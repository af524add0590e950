"""What a request may ask of the sampler, checked once when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lockstep.core.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOP_STRINGS = 16

GrammarKind = Literal["json_schema", "json_object", "regex", "ebnf"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint on the generated text.

    `source` is a JSON schema as text for ``json_schema``, a regular expression for ``regex``, a GBNF or Lark
    grammar for ``ebnf``, and empty for ``json_object``.
    """

    kind: GrammarKind
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next tokens of one request are chosen and when generation ends.

    `temperature` 0 is greedy. `top_k` 0 or -1, `top_p` 1 and `min_p` 0 switch those filters off. Presence and
    frequency penalties count generated tokens only; the repetition penalty counts the prompt too. `seed` with a
    position decides a draw completely, whatever shares the batch. `max_tokens` None means up to the context
    length. `logprobs` k returns the chosen token's and the k best log-probabilities (natural log, after
    penalties, bias and temperature are *not* applied: the model's own distribution).

    Raises InvalidRequest naming the field.
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

    def __post_init__(self) -> None:
        number = self._number
        number("temperature", 0.0, 100.0)
        number("top_p", 0.0, 1.0, open_low=True)
        number("min_p", 0.0, 1.0)
        number("presence_penalty", -2.0, 2.0)
        number("frequency_penalty", -2.0, 2.0)
        number("repetition_penalty", 0.0, 100.0, open_low=True)
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
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"stop takes at most {MAX_STOP_STRINGS} strings", param="stop")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InvalidRequest("stop takes non-empty strings", param="stop")
        for token_id in self.stop_token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                raise InvalidRequest("stop_token_ids takes token ids (integers from 0)", param="stop_token_ids")
        for token_id, bias in self.logit_bias.items():
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                raise InvalidRequest(
                    "logit_bias maps token ids (integers from 0) to numbers", param="logit_bias"
                )
            if not isinstance(bias, (int, float)) or math.isnan(bias) or not -100.0 <= bias <= 100.0:
                raise InvalidRequest("logit_bias values lie between -100 and 100", param="logit_bias")

    def _number(self, name: str, low: float, high: float, *, open_low: bool = False) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise InvalidRequest(f"{name} must be a finite number, not {value!r}", param=name)
        if value < low or value > high or (open_low and value == low):
            bound = "above" if open_low else "from"
            raise InvalidRequest(f"{name} must lie {bound} {low:g} to {high:g}, not {value!r}", param=name)

    def _integer(self, name: str, low: int, high: int | None = None, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidRequest(f"{name} must be an integer, not {value!r}", param=name)
        if value < low or (high is not None and value > high):
            limit = f"at least {low}" if high is None else f"from {low} to {high}"
            raise InvalidRequest(f"{name} must be {limit}, not {value}", param=name)

    @property
    def greedy(self) -> bool:
        """True when the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """True when the choice depends on which tokens came before."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)
