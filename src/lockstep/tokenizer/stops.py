"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Releases text up to the first stop string, and nothing that could still become one.

    The first stop string is the one complete first, so the outcome does not depend on how the text was cut; of
    several complete at the same character the longest wins. `include_stop` releases the stop string itself too.
    """

    def __init__(self, stop_strings: Sequence[str], include_stop: bool = False) -> None:
        self._stops = tuple(stop_strings)
        self._include_stop = include_stop
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(text now safe to show, the stop string that ended it or None). After a match all text is dropped."""
        if self.matched is not None:
            return "", self.matched
        text = self._held + text
        self._held = ""
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            end, start, self.matched = min(found)
            return text[: end if self._include_stop else start], self.matched
        keep = len(text) - self._num_possible_start(text)
        self._held = text[keep:]
        return text[:keep], None

    def finish(self) -> str:
        """The text held back, when no more comes."""
        held, self._held = self._held, ""
        return held

    def _num_possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
