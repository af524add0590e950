"""What the scheduler may use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lockstep.core.errors import ConfigError, nearest

Policy = Literal["fcfs", "priority"]
"""fcfs: in order of arrival. priority: lower `Request.priority` first, then in order of arrival."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Bounds on work and memory, fixed for the life of a scheduler.

    `max_running_requests` counts running sequences: a request with n choices counts n. `chunk_tokens` bounds
    the rows of one step, decode included. `max_queued_requests` bounds the requests of which nothing has run
    yet. `context_length` bounds prompt plus generated tokens. `eos_token_ids` end generation unless a request
    ignores them. `max_plans_in_flight` bounds the plans whose results are awaited. `num_host_pages` hold cached
    prefixes that had to leave the pool. Raises ConfigError naming the field.
    """

    max_running_requests: int
    chunk_tokens: int
    max_queued_requests: int
    context_length: int
    page_size: int
    num_pages: int
    policy: Policy = "fcfs"
    eos_token_ids: tuple[int, ...] = ()
    enable_prefix_cache: bool = True
    num_host_pages: int = 0
    max_plans_in_flight: int = 1

    def __post_init__(self) -> None:
        counts = (
            "max_running_requests",
            "chunk_tokens",
            "max_queued_requests",
            "context_length",
            "page_size",
            "num_pages",
            "max_plans_in_flight",
        )
        for name in counts:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be an integer of at least 1, not {value!r}")
        policies = get_args(Policy)
        if self.policy not in policies:
            hint = nearest(str(self.policy), policies)
            raise ConfigError(f"policy must be one of {', '.join(policies)}, not {self.policy!r}{hint}")

    @property
    def pool_tokens(self) -> int:
        """Tokens whose KV fits in the pool."""
        return self.num_pages * self.page_size

    @property
    def max_sequence_tokens(self) -> int:
        """Prompt plus generated tokens of a sequence alone in the pool; its last token needs no KV."""
        return min(self.context_length, self.pool_tokens + 1)

    @property
    def max_running_sequences(self) -> int:
        """Each running sequence gets at least one row of every step."""
        return min(self.max_running_requests, self.chunk_tokens)

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)
