"""A Hopper card for Triton's compiler, without one: what it is asked for is compiled, and cannot be launched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class _Card:
    """As much of a Triton driver as compiling takes."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiled_programs() -> Iterator[list[str]]:
    """The names of the programs that are compiled inside, in their order."""
    names: list[str] = []
    before, runtime = driver._active, triton.knobs.runtime
    hook = runtime.jit_post_compile_hook

    def noted(*, fn: Any, **facts: Any) -> None:
        names.append(fn.name.rpartition(".")[2])

    driver._active = _Card()
    runtime.jit_post_compile_hook = noted
    try:
        yield names
    finally:
        driver._active, runtime.jit_post_compile_hook = before, hook
