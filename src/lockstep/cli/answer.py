"""Following one answer: its text as it arrives, and the times to report at its end."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

import click

from lockstep.core.clock import Clock, SystemClock
from lockstep.core.errors import EngineDead
from lockstep.core.output import CompletionDelta, RequestOutput


@dataclass(slots=True)
class Answer:
    """What one request has yielded so far. Times are seconds on `clock`; None until they are known."""

    clock: Clock = field(default_factory=SystemClock)
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    ttft_s: float | None = None
    generation_s: float = 0.0
    _num_first_tokens: int = 0

    def follow(self, outputs: Iterable[RequestOutput]) -> Generator[str, None, None]:
        """Takes in every output and passes its text on. Raises EngineDead when the engine gave up."""
        begin_s = self.clock.now_s()
        try:
            for output in outputs:
                self.generation_s = self.clock.now_s() - begin_s
                self._count(output)
                for delta in output.deltas:
                    self._take(delta)
                    if delta.text:
                        yield delta.text
        finally:
            # A reader that leaves early must end the request in the engine now, not at garbage collection.
            if isinstance(outputs, Generator):
                outputs.close()

    def _take(self, delta: CompletionDelta) -> None:
        if delta.error is not None:
            raise EngineDead(delta.error)
        self.text += delta.text
        self.token_ids.extend(delta.token_ids)
        self.finish_reason = delta.finish_reason or self.finish_reason

    def _count(self, output: RequestOutput) -> None:
        self.num_prompt_tokens = output.num_prompt_tokens
        self.num_cached_tokens = output.num_cached_tokens
        self.num_output_tokens = output.num_output_tokens
        if self.ttft_s is None and output.num_output_tokens > 0:
            self.ttft_s = self.generation_s
            self._num_first_tokens = output.num_output_tokens

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Rate of the tokens after the first ones; None when nothing followed."""
        followed = self.num_output_tokens - self._num_first_tokens
        if self.ttft_s is None or followed <= 0 or self.generation_s <= self.ttft_s:
            return None
        return followed / (self.generation_s - self.ttft_s)

    def closing_line(self, load_s: float | None = None) -> str:
        """The figures in one line for people."""
        parts = [
            f"{self.num_prompt_tokens} prompt tokens ({self.num_cached_tokens} cached)",
            f"{self.num_output_tokens} new",
        ]
        if self.decode_tokens_per_s is not None:
            parts.append(f"{self.decode_tokens_per_s:.1f} tokens/s")
        if self.ttft_s is not None:
            parts.append(f"first token after {self.ttft_s:.2f} s")
        if load_s is not None:
            parts.append(f"loaded in {load_s:.2f} s")
        if self.finish_reason not in ("stop", None):
            parts.append(f"ended by {self.finish_reason}")
        return " · ".join(parts)

    def report(self, load_s: float) -> dict[str, Any]:
        """The figures for programs. `total_s` counts from the start of loading to the last token."""
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "usage": {
                "prompt_tokens": self.num_prompt_tokens,
                "cached_tokens": self.num_cached_tokens,
                "completion_tokens": self.num_output_tokens,
                "total_tokens": self.num_prompt_tokens + self.num_output_tokens,
            },
            "timings": {
                "load_s": load_s,
                "ttft_s": self.ttft_s,
                "decode_tokens_per_s": self.decode_tokens_per_s,
                "total_s": load_s + self.generation_s,
            },
        }


def note(text: str) -> None:
    """A dim line beside the result: on stderr, so that the result can be piped."""
    click.echo(click.style(text, dim=True), err=True)
