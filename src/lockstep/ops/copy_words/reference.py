"""Shapes: R rows, W words."""

from __future__ import annotations

import torch


def copy_words(source_RW: torch.Tensor, target_RW: torch.Tensor) -> None:
    """Write every word of the source to its place in the target, in stream order.

    On a device the caller goes on at once: what lies in the host's memory is read and written later.
    """
    target_RW.copy_(source_RW, non_blocking=True)
