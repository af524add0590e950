"""What a gate says: one word and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Outcome = Literal["pass", "fail", "undecided"]
"""undecided: the measurement is too small to tell; a gate that is undecided is not green."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one gate, with its reason in one or two sentences."""

    gate: str
    outcome: Outcome
    reason: str

    @property
    def passed(self) -> bool:
        """True for "pass" alone."""
        return self.outcome == "pass"

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {"gate": self.gate, "outcome": self.outcome, "reason": self.reason}
