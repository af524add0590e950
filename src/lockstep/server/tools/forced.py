"""Calls that must happen: the grammar that leaves no other answer, and the readers of what it lets through."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lockstep.core.errors import InvalidRequest
from lockstep.core.sampling import Grammar
from lockstep.server.tools.reader import CallArguments, CallStart, Piece, Text

_LITERAL_KEYWORDS = frozenset({"const", "enum", "default", "examples"})
_HEADER = re.compile(r'[\s\[,}]*\{\s*"name"\s*:\s*"([^"]*)"\s*,\s*"arguments"\s*:\s*(?=\{)')


class Function(Protocol):
    """What is needed of a tool: its name and the JSON schema of its arguments."""

    @property
    def name(self) -> str: ...

    @property
    def parameters(self) -> dict[str, Any] | None: ...


def arguments_schema(function: Function) -> dict[str, Any]:
    """The schema of the arguments, which are always an object."""
    return {"type": "object"} | (function.parameters or {"properties": {}})


def named_call_grammar(function: Function) -> Grammar:
    """Lets through the arguments of one function."""
    return Grammar("json_schema", json.dumps(arguments_schema(function)))


def required_calls_grammar(functions: Sequence[Function], *, parallel: bool) -> Grammar:
    """Lets through an array of one call, or more where `parallel`, of any of the functions.

    Each function's schema moves to ``#/$defs/<name>``, so references inside it are moved along.
    """
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function.name}, "arguments": {"$ref": f"#/$defs/{function.name}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in functions
    ]
    schema: dict[str, Any] = {"type": "array", "items": {"anyOf": calls}, "minItems": 1}
    if not parallel:
        schema["maxItems"] = 1
    try:
        schema["$defs"] = {f.name: _moved(arguments_schema(f), f"#/$defs/{f.name}") for f in functions}
        return Grammar("json_schema", json.dumps(schema))
    except RecursionError:
        raise InvalidRequest("the tools' parameters are nested too deeply", param="tools") from None


_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def _moved(schema: Any, base: str) -> Any:
    """`schema` with its references to its own root pointing to `base`."""
    if isinstance(schema, list):
        return [_moved(item, base) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):  # a property may be called as keywords are
            moved[key] = {name: _moved(one, base) for name, one in value.items()}
        else:
            moved[key] = value if key in _LITERAL_KEYWORDS else _moved(value, base)
    target = moved.get("$ref")
    if isinstance(target, str) and target.startswith("#"):
        moved["$ref"] = base + target[1:]
    return moved


class NamedCallReader:
    """The whole answer is the arguments of one call."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = False

    def feed(self, text: str) -> Iterator[Piece]:
        if not self._started:
            self._started = True
            yield CallStart(self._name)
        if text:
            yield CallArguments(text)

    def finish(self) -> Iterator[Piece]:
        yield from ()


class RequiredCallsReader:
    """An array of calls whose form the grammar vouches for, so that arguments stream while they are written."""

    def __init__(self) -> None:
        self._buffer = ""
        self._value: _ValueScanner | None = None

    def feed(self, text: str) -> Iterator[Piece]:
        self._buffer += text
        while self._buffer:
            if self._value is None:
                header = _HEADER.match(self._buffer)
                if header is None:
                    return
                self._buffer = self._buffer[header.end() :]
                self._value = _ValueScanner()
                yield CallStart(header[1])
                continue
            end = self._value.end_in(self._buffer)
            arguments = self._buffer if end is None else self._buffer[:end]
            if arguments:
                yield CallArguments(arguments)
            if end is None:
                self._buffer = ""
                return
            self._buffer = self._buffer[end:]
            self._value = None

    def finish(self) -> Iterator[Piece]:
        rest, self._buffer = self._buffer.strip(" \n\r\t}],"), ""
        if rest:
            yield Text(rest)


@dataclass(slots=True)
class _ValueScanner:
    """Finds where a JSON object ends, over any number of pieces."""

    depth: int = 0
    in_string: bool = False
    escaped: bool = False

    def end_in(self, text: str) -> int | None:
        """Position after the object's last brace in this piece, or None when it goes on."""
        for position, character in enumerate(text):
            if self.in_string:
                if self.escaped:
                    self.escaped = False
                elif character == "\\":
                    self.escaped = True
                elif character == '"':
                    self.in_string = False
            elif character == '"':
                self.in_string = True
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if self.depth == 0:
                    return position + 1
        return None
