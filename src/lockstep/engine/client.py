"""What the rest of the world may ask of a running engine. Free of torch: the HTTP process imports it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Protocol

from lockstep.core.output import EngineStats, ModelCard, RequestOutput
from lockstep.core.request import Request
from lockstep.core.sampling import Grammar

if TYPE_CHECKING:
    from lockstep.tokenizer.tokenizer import Tokenizer


class EngineClient(Protocol):
    """One engine, wherever it runs. All coroutines belong to the event loop that called `start`."""

    card: ModelCard
    tokenizer: Tokenizer

    @property
    def is_alive(self) -> bool:
        """True while requests are taken."""
        ...

    @property
    def is_responsive(self) -> bool:
        """False when no engine gave a sign of life for longer than a step explains; it may still come back."""
        ...

    @property
    def max_queued_requests(self) -> int:
        """How many requests may wait for their first step."""
        ...

    async def start(self) -> None:
        """Builds or reaches the engine; `card` and `tokenizer` are valid afterwards."""
        ...

    async def close(self) -> None:
        """Ends every request and releases what the engine holds. May be called twice."""
        ...

    def generate(self, request: Request) -> AsyncIterator[RequestOutput]:
        """Outputs of one request until it ends: an async generator, whose early `aclose` aborts the request.

        A request with `pooling` set yields one output with its `embedding`. Raises InvalidRequest, QueueFull
        and, also in the middle, EngineDead.
        """
        ...

    async def abort(self, request_id: str) -> bool:
        """Ends one request with what it has. False when no such request is running or waiting."""
        ...

    async def abort_all(self) -> int:
        """Ends every request; returns how many there were."""
        ...

    async def flush_cache(self) -> int:
        """Forgets cached prefixes that no request uses; returns the number of pages freed."""
        ...

    async def stats(self) -> EngineStats:
        """A snapshot. Raises EngineDead while the engine restarts, and when it does not answer within seconds."""
        ...

    def validate_grammar(self, grammar: Grammar) -> None:
        """Compiles a grammar and throws the result away. Raises InvalidRequest with the reason."""
        ...
