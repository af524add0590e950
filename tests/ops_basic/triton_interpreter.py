"""Triton's interpreter, for scripts that check kernels in it: they import this before anything that imports Triton.

`as_processors_do` has it round and multiply as devices do. `dtypes_in_turn` chooses among the cases of a contract.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

from lockstep.ops.contract import Case

NARROW = {tl.bfloat16: (torch.bfloat16, torch.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8)}
"""Floats that the interpreter rounds in its own way: how torch does, and what holds their bits."""


def _exchange_language_once() -> None:
    """The interpreter puts its own functions in the place of Triton's at every call, be it of a kernel or by one, and
    takes most of its time for it. Once for each module that has kernels is enough, if they are left there."""
    own, exchanged = interpreter._patch_lang, set[str]()
    nothing_to_restore = interpreter._LangPatchScope()

    def exchange(fn: Any) -> Any:
        if fn.__module__ not in exchanged:
            own(fn)
            exchanged.add(fn.__module__)
        return nothing_to_restore

    interpreter._patch_lang = exchange


def _remember_dtypes() -> None:
    """The interpreter makes a table of all dtypes whenever it looks one up."""
    own = interpreter._get_np_dtype
    of_scalar = cache(own)
    interpreter._get_np_dtype = lambda dtype: own(dtype) if dtype.scalar.is_ptr() else of_scalar(dtype.scalar)


def _reduce_in_halves() -> None:
    """With a function that it does not know the interpreter reduces value by value. Halves do as devices do."""

    def reduce(self: Any, given: tuple[Any, ...]) -> list[Any]:
        axis, dtypes = 0 if self.axis is None else self.axis, [each.dtype.scalar for each in given]
        values = [each.handle.data.reshape(-1) if self.axis is None else each.handle.data for each in given]
        while (size := values[0].shape[axis]) > 1:
            low, high = zip(*(np.split(each, [size // 2], axis) for each in values), strict=True)
            halves = [
                self.to_tensor(each, dtype)
                for side in (low, high)
                for each, dtype in zip(side, dtypes, strict=True)
            ]
            found = self.combine_fn.fn(*halves)
            values = [each.handle.data for each in (found if isinstance(found, tuple) else (found,))]
        if not self.keep_dims:
            values = [each.squeeze(axis) for each in values]
        return [self.to_tensor(each, dtype) for each, dtype in zip(values, dtypes, strict=True)]

    interpreter.ReduceOps.generic_reduce = reduce


_exchange_language_once()
_remember_dtypes()
_reduce_in_halves()


def as_processors_do() -> None:
    """The interpreter cuts floats off where it makes them bfloat16, and multiplies bfloat16 as if bits were numbers.
    Its roundings to 8 bits send halves away from zero, lose carries and cut off subnormal values. Torch's take their
    place."""
    own_convert, own_dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert(values: np.ndarray, given: Any, wanted: Any, rounding: Any) -> np.ndarray:
        if given != tl.float32 or wanted not in NARROW:
            return np.asarray(own_convert(values, given, wanted, rounding))
        dtype, bits = NARROW[wanted]
        floats = torch.from_numpy(np.ascontiguousarray(values).view(np.float32))
        return np.asarray(floats.to(dtype).view(bits).numpy())

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = torch.from_numpy(np.ascontiguousarray(handle.data).view(np.uint16).astype(np.int32) << 16)
        return interpreter.TensorHandle(bits.view(torch.float32).numpy(), tl.float32)

    def dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        return own_dot(builder, widened(a), widened(b), *rest)

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot


def dtypes_in_turn(cases: Iterable[Case]) -> Iterator[Case]:
    """One of those cases that differ in their dtype alone, by turns of each dtype.

    For kernels that convert what they load to float32: a shape says the same in every dtype, and a dtype in any shape.
    Each round begins with another dtype, so that cases which come by turns themselves meet all of them.
    """
    by_dtype = defaultdict[torch.dtype, list[Case]](list)
    for case in cases:
        by_dtype[case.signature["dtype"]].append(case)
    for at, same in enumerate(zip_longest(*by_dtype.values())):
        turn = at + at // len(same)
        yield same[turn % len(same)] or next(filter(None, same))
