"""From a Rejected message back to the error that it was. Free of torch."""

from __future__ import annotations

from lockstep.core.errors import InvalidRequest, LockstepError, QueueFull
from lockstep.engine.messages import Rejected


def rejection(answer: Rejected) -> LockstepError:
    """The error that the engine meant."""
    if answer.kind == "QueueFull":
        return QueueFull(answer.message, retry_after_s=answer.retry_after_s)
    return InvalidRequest(answer.message, param=answer.param, code=answer.code)
