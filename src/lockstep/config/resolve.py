"""From what the user said and the facts to one frozen configuration, with the reason for each value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.config.checks import CHECKS
from lockstep.config.components import COMPONENTS, OPTIONS, EngineConfig, ServerOptions
from lockstep.config.facts import ModelFacts
from lockstep.config.given import Given, Source, wanted
from lockstep.config.option import Option
from lockstep.config.rules import ADJUSTMENTS, RULES, Choice, Situation
from lockstep.core.capabilities import Capabilities


@dataclass(frozen=True, slots=True)
class Decision:
    """Who decided the value of one option, and why. The value of a secret option is "(hidden)"."""

    name: str
    value: Any
    source: Source
    why: str


@dataclass(frozen=True, slots=True)
class Resolution:
    """A complete configuration and, in the order of declaration, one decision per option."""

    config: EngineConfig
    decisions: tuple[Decision, ...]


def resolve(
    given: Mapping[str, Given], model: ModelFacts, device: Capabilities, *, available_bytes: int | None = None
) -> Resolution:
    """Decides every option once. `given` comes from `gather`.

    `available_bytes` is the memory of one device that this process may still take; None: all of it.
    Raises ConfigError when values contradict the model, the device or each other, and OutOfMemory when the
    weights with a minimal KV pool cannot fit.
    """
    decided: dict[str, Any] = {}
    decisions = []
    available_bytes = device.memory_bytes if available_bytes is None else available_bytes
    situation = Situation(model, device, available_bytes, decided)
    for name, option in OPTIONS.items():
        choice = _choose(option, given.get(name), situation)
        decided[name] = choice.value
        shown = "(hidden)" if option.secret and choice.value is not None else choice.value
        decisions.append(Decision(name, shown, choice.source, choice.why))
    for check in CHECKS:
        check(situation)
    parts = {component: _build(component, decided) for component in COMPONENTS}
    return Resolution(EngineConfig(**parts), tuple(decisions))


def resolve_server(given: Mapping[str, Given]) -> ServerOptions:
    """The HTTP server's options alone, which need no facts: the server listens before a model is open."""
    decided = {name: wanted(given, name) for name, option in OPTIONS.items() if option.component == "server"}
    return ServerOptions(**decided)


def _choose(option: Option, entry: Given | None, situation: Situation) -> Choice:
    if entry is not None:
        asked = Choice(entry.value, entry.source, _where(option, entry.source))
        return ADJUSTMENTS[option.name](asked, situation) if option.name in ADJUSTMENTS else asked
    if option.has_auto:
        return RULES[option.name](situation)
    return Choice(option.default, "default", "")


def _where(option: Option, source: Source) -> str:
    if source == "environment":
        return f"from {option.env}"
    return option.flag if source == "command line" and not option.positional else ""


def _build(component: str, decided: Mapping[str, Any]) -> Any:
    names = [name for name, option in OPTIONS.items() if option.component == component]
    return COMPONENTS[component](**{name: decided[name] for name in names})
