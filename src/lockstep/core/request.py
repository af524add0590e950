"""A request as the engine sees it, and why it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lockstep.core.sampling import SamplingParams

FinishReason = Literal["stop", "length", "abort", "deadline", "error"]
"""stop: end token, stop id, stop string or a completed grammar. length: max_tokens or the context length.
abort: the client asked. deadline: its time ran out. error: the engine could not go on; see the message."""

Pooling = Literal["mean", "last"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and what is wanted of it.

    `priority`: lower runs first (policy "priority"). `deadline_s`: seconds from arrival after which the
    request is ended with what it has. `pooling`: when set, the request asks for an embedding of the prompt
    and samples nothing. `params.seed` is never None once the engine has admitted the request.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    deadline_s: float | None = None
    pooling: Pooling | None = None

    @property
    def reads_prefix_cache(self) -> bool:
        """False when every prompt row must be computed, because something is asked of each of them."""
        return self.params.prompt_logprobs is None and self.pooling != "mean"
