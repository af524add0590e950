"""Which reader takes which model's answers apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any

from lockstep.core.errors import ConfigError, nearest
from lockstep.server.tools.hermes import HermesReader
from lockstep.server.tools.llama3_json import Llama3JsonReader
from lockstep.server.tools.reader import AnswerReader

ReaderFactory = Callable[[Collection[str]], AnswerReader]

READERS: dict[str, type[HermesReader] | type[Llama3JsonReader]] = {
    "hermes": HermesReader,
    "llama3_json": Llama3JsonReader,
}
"""Name of the way of writing -> reader, in the order in which templates are looked at."""

DEFAULT = "hermes"

_INSTRUCTIONS = """\
You may call functions to help with the user's request. The functions are described inside <tools></tools>:
<tools>
{tools}
</tools>
To call a function, answer with its name and arguments as JSON inside <tool_call></tool_call>:
<tool_call>
{{"name": <function name>, "arguments": <arguments object>}}
</tool_call>"""


def choose_reader(name: str | None, template_source: str | None) -> ReaderFactory:
    """The reader of that name; without one, the first whose marks stand in the chat template, else Hermes.

    Raises ConfigError for an unknown name.
    """
    if name is None or name == "auto":
        source = template_source or ""
        return next(
            (kind for kind in READERS.values() if any(mark in source for mark in kind.marks)), READERS[DEFAULT]
        )
    if name not in READERS:
        raise ConfigError(
            f"unknown tool call parser {name!r}{nearest(name, READERS)}; expected one of: {', '.join(READERS)}"
        )
    return READERS[name]


def tool_instructions(tools: list[dict[str, Any]]) -> str:
    """A system message for models whose template does not know tools; answers then come Hermes' way."""
    return _INSTRUCTIONS.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
