"""The reference page of all options: `python -m lockstep.config.reference > docs/configuration.md`."""

from __future__ import annotations

import inspect

from lockstep.config.components import COMPONENTS, OPTIONS
from lockstep.config.environment import variables
from lockstep.config.option import Option
from lockstep.config.rules import RULES

_HEAD = """\
# Configuration

<!-- Generated: python -m lockstep.config.reference > docs/configuration.md -->

One declaration per option makes the command line, its help, the keywords of `LLM(...)` and this page. A keyword
is the flag's name with underscores: `--context-length 4096` is `LLM(context_length=4096)`. The command line and
keywords win over the environment; what neither gives has its default. `auto` becomes concrete once, when an
engine starts; `lockstep explain config` prints every value, who decided it and why.
"""


def reference_page() -> str:
    """The page as Markdown, ending in one newline."""
    sections = [_HEAD, *(_section(name, kind) for name, kind in COMPONENTS.items()), _environment()]
    return "\n".join(sections)


def _section(component: str, declaration: type) -> str:
    title = (inspect.getdoc(declaration) or "").splitlines()[0]
    rows = [_row(option) for option in OPTIONS.values() if option.component == component]
    head = ["| option | default | meaning |", "|---|---|---|"]
    return "\n".join([f"## {component.capitalize()}\n", title + "\n", *head, *rows, ""])


def _row(option: Option) -> str:
    name = "`MODEL`" if option.positional else f"`{option.flag} {option.metavar}".strip() + "`"
    meaning = option.help
    if option.has_auto:
        rule = " ".join((inspect.getdoc(RULES[option.name]) or "").split())
        meaning += f" *auto*: {rule[0].lower()}{rule[1:]}"
    default = f"`{option.default_text}`" if option.default not in (None, ()) else ""
    cells = (name, default, meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _environment() -> str:
    rows = [f"| `{name}` | {text} |" for name, text in sorted(variables().items())]
    lead = "Read when a command starts, never written; set but empty is the same as not set.\n"
    return "\n".join(["## Environment variables\n", lead, "| variable | meaning |", "|---|---|", *rows, ""])


if __name__ == "__main__":
    print(reference_page(), end="")
