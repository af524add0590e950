"""What a client of the engine receives.

What there is one of for each request and step is not frozen, which would take four times as long to make; nobody
writes to it once it was handed on.
"""

from __future__ import annotations

from dataclasses import dataclass

from lockstep.core.request import FinishReason
from lockstep.core.step import TokenLogprob


@dataclass(slots=True)
class CompletionDelta:
    """New text and tokens of one choice since the last output.

    `text` never ends inside a character nor inside a possible stop string. `finish_reason` is set once, on
    the last delta of the choice; `matched_stop` then holds the stop string or token id that ended it, if any.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    matched_stop: str | int | None = None
    error: str | None = None


@dataclass(slots=True)
class RequestOutput:
    """News of one request. Token counts are totals so far; `num_output_tokens` adds all choices."""

    request_id: str
    deltas: tuple[CompletionDelta, ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    finished: bool
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    embedding: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Facts about the served model that clients may know."""

    name: str
    path: str
    architecture: str
    context_length: int
    vocab_size: int
    dtype: str
    quantization: str
    pooling: str | None
    num_parameters: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine. Counters only grow while the engine process lives.

    `num_discarded_rows` were computed for sequences that had ended before their step's result came.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_pages_total: int = 0
    num_pages_in_use: int = 0
    num_pages_cached: int = 0
    num_host_pages_total: int = 0
    num_host_pages_cached: int = 0
    page_size: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_host_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_discarded_rows: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    last_step_s: float = 0.0
    last_step_tokens: int = 0
    uptime_s: float = 0.0
