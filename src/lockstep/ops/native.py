"""What operators' native kernels have in common: one kernel for each instruction set, and weights packed for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch

from lockstep.config.environment import disabled_features
from lockstep.native import extension, usable_instruction_sets, why_not
from lockstep.ops.contract import Kernel, Signature
from lockstep.ops.grouped_weight import GroupedWeight

INSTRUCTION_SETS = ("amx", "avx512_bf16", "avx512", "avx_vnni", "avx2", "neon", "scalar")
"""Every set that the extension has kernels for, best first."""

_VERIFIED_ON = {
    name: ("AMD EPYC (Zen 5)",) for name in (None, "avx512_bf16", "avx512", "avx_vnni", "avx2", "scalar")
} | {"amx": ("Intel Xeon with AMX",)}
"""Processors on which the kernels of a set, or the best set of the processor (None), met their contracts."""

Refuses = Callable[[Signature], str | None]


@cache
def best_instruction_set() -> str | None:
    """The best set that this processor and this build share; None without the extension."""
    return next(iter(usable_instruction_sets(disabled_features())), None)


def native_kernels(
    op: str,
    function: Callable[..., Any],
    *,
    refuses: Refuses | None = None,
    prepare: Callable[..., Any] | None = None,
    take_rows: Callable[..., torch.Tensor] | None = None,
) -> tuple[Kernel, ...]:
    """The kernel "native" of the best usable instruction set, and one for each set by name, e.g. "native_avx2".

    `function`, `prepare` and `take_rows` get the set's name as `instruction_set`. `refuses` looks at a call once the
    set is known to be usable.
    """
    return tuple(
        Kernel(
            op=op,
            provider=provider,
            function=_for_set(function, name),
            platforms=frozenset({"cpu"}),
            refuses=partial(_refusal, name, refuses),
            prepare=prepare and _for_set(prepare, name),
            take_rows=take_rows and _for_set(take_rows, name),
            verified_on=_VERIFIED_ON.get(name, ()),
            opaque=prepare is not None,
            by_name=name is not None,
        )
        for provider, name in _providers()
    )


def is_native(kernel: Kernel) -> bool:
    """True for a native kernel, and for what stands for one that computes a larger operator."""
    return kernel.provider.rpartition(".")[2].startswith("native")


def _providers() -> Iterator[tuple[str, str | None]]:
    yield "native", None
    for name in INSTRUCTION_SETS:
        yield f"native_{name}", name


def _for_set(function: Callable[..., Any], name: str | None) -> Callable[..., Any]:
    """The function with its instruction set, which is looked for when it is first called."""

    def call(*given: Any) -> Any:
        try:
            return function(*given, instruction_set=name or best_instruction_set())
        except TypeError:
            # The extension knows tensors alone; what is no tensor may say itself why it cannot be used as one.
            for value in given:
                getattr(value, "shape", None)
            raise

    call.__name__ = function.__name__
    call.__doc__ = function.__doc__
    return call


def _refusal(name: str | None, refuses: Refuses | None, signature: Signature) -> str | None:
    usable = usable_instruction_sets(disabled_features())
    if not usable:
        return f"there are no native kernels: {why_not()}"
    if name is not None and name not in usable:
        return f"this processor or this build lacks {name}"
    if name is None and usable[0] == "scalar":
        return "this processor runs the plain native kernels alone, which are slower than torch's"
    return refuses(signature) if refuses else None


def pack(matrix: torch.Tensor | GroupedWeight) -> Any:
    """A constant weight [O, I] of bfloat16 values or grouped integers as the extension's PackedWeight."""
    native = extension()
    assert native is not None
    if isinstance(matrix, GroupedWeight):
        minimum = None if matrix.minimum_OG is None else matrix.minimum_OG.contiguous().numpy()
        scale = matrix.scale_OG.contiguous().numpy()
        return native.PackedWeight.from_integers(
            matrix.q_OI.contiguous().numpy(), scale, minimum, matrix.zero, matrix.bits
        )
    return native.PackedWeight.from_bf16(matrix.contiguous().view(torch.uint16).numpy())


def take_rows(packed: Any, ids_T: torch.Tensor, *, instruction_set: str) -> torch.Tensor:
    """Rows [T, I] of a packed weight in float32."""
    rows_TI = torch.empty(ids_T.shape[0], packed.num_inputs)
    packed.take_rows(ids_T.numpy(), instruction_set, rows_TI.numpy())
    return rows_TI
