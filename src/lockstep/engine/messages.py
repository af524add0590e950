"""What crosses process borders: msgspec structs over ZeroMQ, never pickle. Free of torch.

A client sends Commands; the engine answers with Events. The first rank sends each further rank the StepInputs of
every step, so that all of them schedule alike.
"""

from __future__ import annotations

from typing import Any

import msgspec

from lockstep.config import EngineConfig
from lockstep.config.given import Source
from lockstep.core.output import EngineStats, ModelCard
from lockstep.core.request import FinishReason, Request
from lockstep.core.step import SequenceEvent


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Run this request."""

    request: Request


class Abort(msgspec.Struct, tag=True, frozen=True):
    """End this request with what it has; it may be unknown or finished already."""

    request_id: str
    reason: FinishReason = "abort"


class FlushCache(msgspec.Struct, tag=True, frozen=True):
    """Forget unused prefixes; answered by a Reply with the number of pages."""

    call_id: int


class AskStats(msgspec.Struct, tag=True, frozen=True):
    """Answered by a Reply with EngineStats."""

    call_id: int


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """End every request and exit."""


Command = Submit | Abort | FlushCache | AskStats | Shutdown


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The engine takes requests from now on. `computes_on_host`: on the cores that its client runs on, too."""

    card: ModelCard
    decisions: list[dict[str, Any]]
    native_kernels: str | None = None
    computes_on_host: bool = True


class LoadProgress(msgspec.Struct, tag=True, frozen=True):
    """Weights loaded so far."""

    num_loaded: int
    num_total: int


class Sequences(msgspec.Struct, tag=True, frozen=True):
    """News of sequences after a step."""

    events: list[SequenceEvent]


class Rejected(msgspec.Struct, tag=True, frozen=True):
    """A request that was not admitted. `kind` is the error's class name."""

    request_id: str
    kind: str
    message: str
    param: str | None = None
    code: str = "invalid_value"
    retry_after_s: float = 1.0


class Reply(msgspec.Struct, tag=True, frozen=True):
    """The answer to the call with this id."""

    call_id: int
    stats: EngineStats | None = None
    count: int = 0


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The engine cannot start or go on; it exits after this."""

    kind: str
    message: str


Event = Ready | LoadProgress | Sequences | Rejected | Reply | Failed


class StepInputs(msgspec.Struct, frozen=True):
    """What the first rank decided for a step: requests, ends, flushes; and a digest of all tokens it chose so far."""

    step: int
    commands: list[Submit | Abort | FlushCache | Shutdown]
    digest: int


class EngineSpec(msgspec.Struct, frozen=True):
    """How to start an engine process: the options its user gave, by name, with their source."""

    options: dict[str, tuple[Any, Source]]
    commands_address: str
    events_address: str


class WorkerSpec(msgspec.Struct, frozen=True):
    """How to start a further rank. The configuration is the first rank's, not resolved again."""

    config: EngineConfig
    rank: int
    inputs_address: str
    events_address: str
    store: str


def encode(message: Any) -> bytes:
    """Any of the structs of this file as bytes."""
    return _ENCODER.encode(message)


def decode_command(data: bytes) -> Command:
    """Raises msgspec.ValidationError or DecodeError for anything else."""
    return _COMMANDS.decode(data)


def decode_event(data: bytes) -> Event:
    """Raises msgspec.ValidationError or DecodeError for anything else."""
    return _EVENTS.decode(data)


def decode_inputs(data: bytes) -> StepInputs:
    """Raises msgspec.ValidationError or DecodeError for anything else."""
    return _INPUTS.decode(data)


_ENCODER = msgspec.msgpack.Encoder()
_COMMANDS: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_EVENTS: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
_INPUTS: msgspec.msgpack.Decoder[StepInputs] = msgspec.msgpack.Decoder(StepInputs)
