"""One choice of a request on its way through the scheduler."""

from __future__ import annotations

from typing import Final

from lockstep.core.request import Request
from lockstep.core.sampling import SamplingParams
from lockstep.core.step import SequenceStart
from lockstep.kv.index.page_index import PageTable

Rank = tuple[int, int, int]


class Sequence:
    """The tokens of one choice, and how many of them are computed. The difference is owed.

    `num_tokens` counts those that plans in flight sample too, whose ids are not in `token_ids` yet: they are awaited.
    `num_computed` counts what plans in flight compute too, `num_landed` only what results have confirmed. There are
    never more than `max_tokens`, prompt included.

    It runs exactly while it has a page `table`. `rank` orders both the queue and the running sequences: by
    priority, then those that have run before (in order of admission), then the new ones (in order of arrival).
    So a preempted sequence, which keeps its rank, waits in front of all new ones of its priority.
    """

    __slots__ = (
        "embeds",
        "ended",
        "group",
        "index",
        "is_plain",
        "max_tokens",
        "min_tokens",
        "must_land",
        "num_cached_tokens",
        "num_computed",
        "num_landed",
        "num_prompt_rows_reported",
        "num_prompt_tokens",
        "num_tokens",
        "params",
        "prefilling",
        "priority",
        "rank",
        "request_id",
        "seq_id",
        "stop_token_ids",
        "table",
        "token_ids",
    )

    def __init__(
        self,
        seq_id: int,
        group: RequestGroup,
        index: int,
        params: SamplingParams,
        *,
        priority: int,
        max_new_tokens: int,
        stop_token_ids: frozenset[int],
    ) -> None:
        self.seq_id: Final = seq_id
        self.request_id: Final = group.request.request_id
        self.group: Final = group
        self.index: Final = index
        self.params: Final = params
        self.priority: Final = priority
        self.min_tokens: Final = params.min_tokens
        self.stop_token_ids: Final = stop_token_ids
        self.num_prompt_tokens: Final = len(group.request.prompt_token_ids)
        self.max_tokens: Final = self.num_prompt_tokens + max_new_tokens
        self.token_ids = list(group.request.prompt_token_ids)
        self.num_tokens = self.num_prompt_tokens
        self.embeds: Final = group.request.pooling is not None
        self.must_land: Final = params.grammar is not None
        self.is_plain: Final = not self.embeds and not self.must_land
        """Whether it samples, and nothing is decided between its tokens."""
        self.num_computed = 0
        self.num_landed = 0
        self.ended = False
        self.rank: Rank = (priority, 1, seq_id)
        self.table: PageTable | None = None
        self.prefilling = False
        """Whether some of what it knew when it began to run is not planned yet."""
        self.num_cached_tokens: int | None = None
        """The prefix hit of the first admission; None before it."""
        self.num_prompt_rows_reported = 0
        """Prompt rows whose log-probabilities the client has; a recompute finds them again."""

    @property
    def num_owed(self) -> int:
        """Tokens, known or awaited, that nothing computes yet."""
        return self.num_tokens - self.num_computed

    @property
    def num_awaited(self) -> int:
        """Tokens that plans in flight sample."""
        return self.num_tokens - len(self.token_ids)

    @property
    def awaits_end(self) -> bool:
        """Whether the tokens in flight are the last that it may have, so that nothing of it is to be planned."""
        return self.num_tokens >= self.max_tokens or self.num_tokens == self.num_computed

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_new(self) -> bool:
        """Whether it was never admitted."""
        return self.rank[1] == 1

    @property
    def may_read_cache(self) -> bool:
        """False while something is asked of each prompt row and some of those rows have not been computed."""
        request = self.group.request
        if request.pooling is not None:
            return request.reads_prefix_cache
        return (
            self.params.prompt_logprobs is None or self.num_prompt_rows_reported >= self.num_prompt_tokens - 1
        )

    def enter(self, table: PageTable) -> SequenceStart:
        """Starts to run on a page table that holds no more than its cached prefix."""
        num_cached = table.num_cached_tokens
        self.table = table
        self.num_computed = self.num_landed = num_cached
        self.prefilling = True
        if self.num_cached_tokens is None:
            self.num_cached_tokens = num_cached
        return SequenceStart(
            seq_id=self.seq_id,
            params=self.params,
            token_ids=tuple(self.token_ids),
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=num_cached,
            page_ids=tuple(table.page_ids),
            pooling=self.group.request.pooling,
        )


class RequestGroup:
    """A request and those of its sequences that have not ended, by index.

    `held` sequences (all but the first) wait outside the queue until the first one's prompt is planned, so
    that they find its pages in the prefix cache.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.unfinished: dict[int, Sequence] = {}
        self.held: list[Sequence] = []

    def unhold(self) -> list[Sequence]:
        """The sequences that waited for the first one; none the second time."""
        freed, self.held = self.held, []
        return freed
