"""Triton programs launched, or only compiled: of meta tensors, which have sizes and no values, nothing is computed.

A kernel whose launches go through `launch` is compiled by calling it with meta tensors, on any thread and without
memory. A program depends on types, on constants, and on whether addresses and sizes are multiples of 16; a meta
tensor's address counts as one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch


def launch(program: Any, grid: tuple[int, ...], like: torch.Tensor) -> Callable[..., object]:
    """What is called with a Triton program's arguments, of which `like` is one."""
    return partial(program.warmup, grid=grid) if like.is_meta else program[grid]


def on_meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor without values."""
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_on(device: torch.device, function: Callable[..., object], *given: Any) -> Callable[[], object]:
    """What compiles the programs of a call with meta tensors for a device."""

    def compile_programs() -> None:
        with torch.get_device_module(device).device(device):
            function(*given)

    return compile_programs
