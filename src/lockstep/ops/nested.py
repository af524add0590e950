"""Values of calls that hold tensors inside: records and tuples of them, such as a weight in parts or a decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch


def with_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The value with every tensor in it changed; dataclasses and tuples are walked, anything else stays as it is."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(with_tensors(each, change) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{each.name: with_tensors(getattr(value, each.name), change) for each in fields(value)}
        )
    return value


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor that `with_tensors` would change, in its order."""
    found: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    with_tensors(value, keep)
    return found
