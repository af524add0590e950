"""A part of the report: it collects findings as JSON types, and makes Markdown of findings read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Findings = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """`collect` returns findings, whether all is as it should be among them as "passed"."""

    name: str
    title: str
    collect: Callable[[], Findings]
    page: Callable[[Mapping[str, Any]], str]


def cell(text: str) -> str:
    """A text as it is in a cell of a Markdown table, line ends and all."""
    line = json.dumps(text, ensure_ascii=False)[1:-1].replace(r"\"", '"')
    return f"`{line}`".replace("|", r"\|")


def verdict(passed: bool) -> str:
    return "yes" if passed else "**no**"
