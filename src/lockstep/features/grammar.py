"""Grammars to token masks, by way of the llguidance library. Needs no torch."""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, cast

from lockstep.core.errors import IntegrityError, InvalidRequest
from lockstep.core.sampling import Grammar
from lockstep.features.guidance_vocabulary import GuidanceVocabulary
from lockstep.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
    from numpy.typing import NDArray

# The whitespace of json.dumps and no other: models know it well, and a small model that may write blanks
# wherever JSON allows them can go on writing them for ever.
# A `oneOf` whose members may overlap is read as `anyOf`; no grammar can say "exactly one".
_JSON_STYLE: Any = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "coerce_one_of": True,
}

# Work that one step may cost before its sequence fails: a fifth and a fourth of the library's own limits, which let
# the regular expression (a{1000}){1000} hold every other sequence up for half a second.
_FIRST_FUEL, _STEP_FUEL = 200_000, 50_000

# What outgrows the limits does so within the first few tokens, so that many steps are tried before a grammar is used.
LARGEST_DIVISOR = 100_000
"""A fifth of a second to compile; ten times as much takes 12 s and hundreds of megabytes."""
_NUM_TRIED_TOKENS = 8

_CANNOT_GO_ON = "the grammar cannot go on after token"

_NAMES = {
    "json_schema": "JSON schema",
    "json_object": "JSON grammar",
    "regex": "regular expression",
    "ebnf": "EBNF grammar",
}

# llguidance's word for: no token can follow and the grammar is not satisfied.
_NO_TEXT = "NoExtensionBias"

INVALID_GRAMMAR = "invalid_grammar"
"""The `code` of every error that is the grammar's."""

_GBNF_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)


def cannot_go_on(token_id: int, why: str) -> InvalidRequest:
    """The error of a sequence whose grammar failed while it ran."""
    return InvalidRequest(f"{_CANNOT_GO_ON} {token_id}: {why}", code=INVALID_GRAMMAR)


def failed_by_grammar(message: str) -> bool:
    """Whether the error that ended a sequence, which is text once it left the engine, is one of `cannot_go_on`."""
    return message.startswith(_CANNOT_GO_ON)


class GrammarState:
    """Where one sequence stands in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def fill_mask(self, row: NDArray[np.int32]) -> None:
        """Sets bit i % 32 of `row[i // 32]` exactly for the tokens i that may come next.

        `row` may be wider than the tokenizer's vocabulary (the rest is forbidden) or narrower. End tokens are
        allowed when the answer may end; nothing else is once it must, or after `error`.
        """
        import numpy as np

        words = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)
        num_words = min(len(row), len(words))
        row[:num_words] = words[:num_words]
        row[num_words:] = 0

    def accept(self, token_id: int) -> bool:
        """Moves past a token. False, with `error` set, when the grammar does not allow it."""
        return self._matcher.consume_token(token_id)

    def rollback(self, num_tokens: int) -> None:
        """Forgets the last accepted tokens. Raises IntegrityError when there are not so many."""
        if not self._matcher.rollback(num_tokens):
            raise IntegrityError(f"a grammar cannot go back {num_tokens} tokens: {self.error}")

    @property
    def complete(self) -> bool:
        """True when nothing but an end token may follow."""
        return self._matcher.is_stopped()

    @property
    def may_end(self) -> bool:
        """True when the text so far is an answer."""
        return self._matcher.is_accepting()

    @property
    def error(self) -> str:
        """Why the grammar cannot go on, or an empty string."""
        return _reason(self._matcher.get_error()) if self._matcher.is_error() else ""


class GrammarCompiler:
    """Makes grammar states for one tokenizer; compiled grammars are kept, least recently used leave first."""

    def __init__(self, tokenizer: Tokenizer, *, cache_size: int = 64) -> None:
        self._tokenizer = tokenizer
        self._compiled = lru_cache(maxsize=cache_size)(self._compile)

    def validate(self, grammar: Grammar) -> None:
        """Raises InvalidRequest with the reason when the grammar cannot be used."""
        self._compiled(grammar)

    def start(self, grammar: Grammar) -> GrammarState:
        """A state before the first token. Raises InvalidRequest like `validate`."""
        return GrammarState(self._compiled(grammar).deep_copy())

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        table = cast("TokenizerWrapper", GuidanceVocabulary(self._tokenizer))
        return LLTokenizer(table, eos_token=list(self._tokenizer.eos_token_ids))

    def _compile(self, grammar: Grammar) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            verbose_errors=False, initial_lexer_fuel=_FIRST_FUEL, step_lexer_fuel=_STEP_FUEL
        )
        matcher = LLMatcher(self._vocabulary, _translate(grammar), log_level=0, limits=limits)
        # The first mask is where a grammar that matches nothing, or is far too large, shows itself.
        if not matcher.is_error():
            matcher.compute_bitmask()
        error = _reason(matcher.get_error()) if matcher.is_error() else ""
        if matcher.is_stopped() and not matcher.is_accepting() and error in ("", _NO_TEXT):
            raise _refusal(grammar, "matches no text at all")
        if error := error or _error_of_trial(matcher.deep_copy()):
            raise _refusal(grammar, f"cannot be used: {error}")
        return matcher


def _refusal(grammar: Grammar, why: str) -> InvalidRequest:
    return InvalidRequest(f"the {_NAMES[grammar.kind]} {why}", code=INVALID_GRAMMAR)


def _error_of_trial(matcher: LLMatcher) -> str:
    """What stops an answer within its first tokens, whichever they are; empty when nothing does."""
    import numpy as np

    for _ in range(_NUM_TRIED_TOKENS):
        if matcher.is_stopped():
            break
        words = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.flatnonzero(np.unpackbits(words, bitorder="little"))
        if len(allowed) == 0 or not matcher.consume_token(int(allowed[-1])):
            break
    return _reason(matcher.get_error()) if matcher.is_error() else ""


def _translate(grammar: Grammar) -> str:
    """The grammar in llguidance's own notation. Raises InvalidRequest when it cannot be read."""
    from llguidance import LLMatcher

    match grammar.kind:
        case "json_object":
            return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=_JSON_STYLE)
        case "json_schema":
            try:
                return LLMatcher.grammar_from_json_schema(_read_schema(grammar.source), overrides=_JSON_STYLE)
            except ValueError as error:  # of numbers beyond 64 bits, and halves of surrogate pairs
                raise InvalidRequest(f"the JSON schema cannot be read: {error}") from error
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.source)
        case "ebnf":
            return LLMatcher.grammar_from_lark(_lark(grammar.source))


def _read_schema(source: str) -> dict[str, Any]:
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the JSON schema is not JSON: {error}") from error
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise InvalidRequest(f"a JSON schema is an object, not {json.dumps(schema)[:40]}")
    if (divisor := _common_multiple(schema)) > LARGEST_DIVISOR:
        raise InvalidRequest(
            f"the JSON schema's multipleOf have {divisor} as common multiple; {LARGEST_DIVISOR} is the most"
        )
    return schema


def _common_multiple(schema: Any) -> int:
    """Of all `multipleOf`, in units of their last digits: a matcher may need a state for each remainder."""
    multiple, waiting = 1, [schema]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            divisor: Any = found.get("multipleOf")
            is_number = isinstance(divisor, (int, float)) and not isinstance(divisor, bool)
            if is_number and 0 < divisor < math.inf:
                digits = Decimal(str(divisor)).normalize().as_tuple().digits
                multiple = math.lcm(multiple, int("".join(map(str, digits))))
            waiting += found.values()
        elif isinstance(found, list):
            waiting += found
    return multiple


def _lark(source: str) -> str:
    """Lark as it is; GBNF (llama.cpp's notation, whose start rule is `root`) translated."""
    from llguidance.gbnf_to_lark import any_to_lark, is_lark_syntax

    if is_lark_syntax(source):
        return source
    try:
        return any_to_lark(_GBNF_ESCAPE.sub(_spell_out, source))
    except Exception as error:  # the converter raises bare Exception
        raise InvalidRequest(f"the EBNF grammar cannot be read: {_reason(str(error))}") from error


def _spell_out(escape: re.Match[str]) -> str:
    r"""A GBNF escape such as ``\u00e9`` in a form that Lark has too: the character, or ``\x41`` in ASCII."""
    digits = escape[1] or escape[2] or escape[3]
    if digits is None:
        return escape[0]
    code = int(digits, 16)
    if code > 0x10FFFF or 0xD800 <= code < 0xE000:
        raise ValueError(f"{escape[0]} is not a character")
    return chr(code) if code >= 0x80 else f"\\x{code:02x}"


def _reason(message: str) -> str:
    """The line of a library's message that says what is wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    cause = next(
        (line for line in lines if line.startswith("error: ")), lines[0] if lines else "unknown reason"
    )
    return cause.removeprefix("error: ")[:300]
