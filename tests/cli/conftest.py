"""Puts the scripted engine where the commands look for the real one."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
from scripted_llm import ScriptedLLM


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[ScriptedLLM]:
    """Every scripted engine that a command opened."""
    instances: list[ScriptedLLM] = []

    class Recorded(ScriptedLLM):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            instances.append(self)

    module = types.ModuleType("lockstep.engine.llm")
    module.LLM = Recorded  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lockstep.engine.llm", module)
    for name in ("words", "failure", "opening_failure", "on_token", "chat_template", "room"):
        monkeypatch.setattr(ScriptedLLM, name, getattr(ScriptedLLM, name))
    return instances
