"""Named points where a run can be watched.

A layer asks its context for `probe`, once, when the model is built. Off, it is None and the code at the point
is one `if` on a constant; on, it receives the tensor with the names of its axes, its placement and the identity
of each row, enough to tell later whether what one operator read is what another wrote.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class ProbePoint:
    """Where a value was seen. `axes` names the tensor's dims, e.g. ("token", "hidden"). `placement` is
    "replicated", "sharded:tp:1" (axis, dim) or "partial:tp"."""

    name: str
    axes: tuple[str, ...]
    placement: str = "replicated"


class Probe(Protocol):
    """Receives values. `value` is a tensor of the framework in use; core does not know which."""

    def wants(self, point: ProbePoint) -> bool:
        """Asked once per point when a model is built; a point that nobody wants costs nothing later."""
        ...

    def record(self, point: ProbePoint, value: Any) -> None:
        """Called in program order. Must not change `value`."""
        ...

    def begin_step(self, step_id: int, rows: tuple[tuple[int, int], ...]) -> None:
        """Names the (sequence, position) of each row of the tensors that follow."""
        ...
