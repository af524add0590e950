"""What the dialects share: token counts and the clock of `created`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from lockstep.core.output import RequestOutput


def created_s() -> int:
    """Wall-clock time in whole seconds since 1970, as OpenAI's `created` wants it."""
    return int(time.time())


@dataclass
class Usage:
    """Token counts of one HTTP request, over all its prompts; each output brings totals of its prompt.

    `counts_output` is off when the client asked for no new tokens; the engine samples one, which is dropped.
    """

    counts_output: bool = True
    _latest: dict[int, RequestOutput] = field(default_factory=dict)

    def note(self, index: int, output: RequestOutput) -> None:
        """Replaces the totals of the prompt at this position."""
        self._latest[index] = output

    def as_openai(self) -> dict[str, Any]:
        """The `usage` object."""
        outputs = self._latest.values()
        num_prompt = sum(output.num_prompt_tokens for output in outputs)
        num_output = sum(output.num_output_tokens for output in outputs) if self.counts_output else 0
        num_cached = sum(output.num_cached_tokens for output in outputs)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }
