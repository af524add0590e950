"""Chat messages to a prompt, by the Jinja template that a model brings.

The environment is the one that templates on the Hub are written for: sandboxed Jinja with loop controls,
`raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, and `{% generation %}` marks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lockstep.core.errors import InvalidRequest, ModelFileError

DEFAULT = "default"
TOOL_USE = "tool_use"


class _RaisedByTemplate(TemplateError):
    """The template called `raise_exception`: these messages break a rule of the model."""


class _GenerationMark(Extension):
    """`{% generation %}` marks answers for training; when serving, its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise _RaisedByTemplate(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


_UNRENDERABLE = (
    TemplateError,
    TypeError,
    ValueError,
    KeyError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class ChatTemplate:
    """A model's chat template, or several by name of which `tool_use` serves requests with tools.

    `special_tokens` are the variables such as `bos_token`. `now` is the clock behind `strftime_now`, `called` what
    errors call the template. It is compiled on first use; a broken one raises ModelFileError then.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        special_tokens: Mapping[str, str],
        *,
        now: Callable[[], datetime] = datetime.now,
        called: str = "the model's chat template",
    ) -> None:
        self.sources = {DEFAULT: source} if isinstance(source, str) else dict(source)
        self.special_tokens = dict(special_tokens)
        self._now = now
        self._called = called
        self._templates: dict[str, Template] = {}

    @property
    def supports_tools(self) -> bool:
        """True when the template does something with `tools`. Raises ModelFileError when it is broken."""
        return any(self._reads_tools(name) for name in self.sources)

    def check(self) -> None:
        """Raises ModelFileError when the template, or one of several, is broken."""
        for name in self.sources:
            self._compiled(name)

    def render(
        self,
        /,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt text for these messages, special tokens spelled out.

        Encode it with `add_special_tokens=False`. `kwargs` are further variables of the template. Raises
        InvalidRequest when the template refuses the messages, ModelFileError when the template is broken.
        """
        name = TOOL_USE if tools and TOOL_USE in self.sources else self._default_name
        variables = {
            **self.special_tokens,
            **kwargs,
            "messages": messages,
            "tools": tools,
            "documents": kwargs.get("documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._compiled(name).render(variables)
        except _RaisedByTemplate as error:
            raise InvalidRequest(f"{self._called} refuses: {error}", param="messages") from error
        except _UNRENDERABLE as error:
            raise InvalidRequest(
                f"{self._called} cannot render these messages: {error}", param="messages"
            ) from error

    @property
    def _default_name(self) -> str:
        return DEFAULT if DEFAULT in self.sources else next(iter(self.sources))

    @cached_property
    def _environment(self) -> Environment:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationMark, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: self._now().strftime(pattern)
        return environment

    def _reads_tools(self, name: str) -> bool:
        self._compiled(name)
        return "tools" in meta.find_undeclared_variables(self._environment.parse(self.sources[name]))

    def _compiled(self, name: str) -> Template:
        if name not in self._templates:
            try:
                self._templates[name] = self._environment.from_string(self.sources[name])
            except TemplateSyntaxError as error:
                called = self._called if len(self.sources) == 1 else f"{self._called} {name!r}"
                raise ModelFileError(f"{called} is broken at line {error.lineno}: {error.message}") from error
        return self._templates[name]
