"""What an operator means, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Signature = Mapping[str, Any]
"""What is known of a call when a model is built: dtype, sizes, flags. Keys are the contract's `signature` names."""


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument. `axes` names its dims, empty for plain numbers.

    `written`: the operator's results lie in it. `scratch`: it may be overwritten with anything, and nobody reads it
    afterwards. Any other argument stays as it was. `constant`: a weight that is fixed when a model is built; a
    kernel's `prepare` turns it into the form that the kernel reads. `opaque`: neither a tensor nor a number, so that no
    graph of torch can hold it.
    """

    name: str
    axes: tuple[str, ...] = ()
    written: bool = False
    scratch: bool = False
    constant: bool = False
    opaque: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """One generated call: positional arguments for the reference and every kernel, and the signature it has.

    `make` builds fresh arguments from a seeded generator, so that writing kernels cannot spoil the next run.
    """

    name: str
    signature: Signature
    make: Callable[[torch.Generator], tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Workload:
    """The calls that an operator is timed with, and how much work each of them is.

    `axis` says what grows along `sizes`. `case` gives the call of one size. `num_bytes` and `num_flops` of the call's
    arguments are what no kernel can do without: bytes between the device's memory and its processors, and
    floating-point operations. Left out, every tensor that goes in is read once and every result written once, and the
    arithmetic is too little to be the limit.
    """

    axis: str
    sizes: tuple[int, ...]
    case: Callable[[int], Case]
    num_bytes: Callable[..., int] | None = None
    num_flops: Callable[..., int] | None = None

    def bytes_moved(self, arguments: Sequence[Any], results: Iterable[torch.Tensor]) -> int:
        """Bytes of one call, whatever kernel serves it."""
        if self.num_bytes is not None:
            return self.num_bytes(*arguments)
        given = (value for value in arguments if isinstance(value, torch.Tensor))
        return sum(tensor.nbytes for tensor in (*given, *results))

    def flops(self, arguments: Sequence[Any]) -> int:
        """Floating-point operations of one call; 0 where they are too few to count."""
        return 0 if self.num_flops is None else self.num_flops(*arguments)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest accepted error: `absolute + relative * |expected|`, elementwise, against float64 maths."""

    absolute: float
    relative: float


@dataclass(frozen=True, slots=True)
class Contract:
    """One operator: its arguments, where it rounds, the calls it is tested with and how exact it must be.

    `reference` is plain PyTorch. `mutants` are known-wrong versions; the tolerances must reject each one.
    `tolerance` maps a result's dtype, and must hold the first result's, which serves for dtypes that are not there.
    `tolerance_of` holds those of named results that have their own, each by the first result's dtype.
    Where nothing at all is accepted, the reference's own bits are expected, not float64's. An operator that returns
    nothing is judged by what it wrote. `workload` is what it is timed with; None for one that nobody times. `parts`
    are the operators that a layer composes it of where no kernel computes them together.
    """

    name: str
    summary: str
    arguments: tuple[Argument, ...]
    returns: tuple[str, ...]
    rounding: str
    signature: tuple[str, ...]
    reference: Callable[..., Any]
    cases: Callable[[], Iterable[Case]]
    tolerance: Mapping[torch.dtype, Tolerance]
    mutants: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    workload: Workload | None = None
    parts: tuple[str, ...] = ()
    tolerance_of: Mapping[str, Mapping[torch.dtype, Tolerance]] = field(default_factory=dict)

    def accepted(self, result: str, dtype: torch.dtype, first: torch.dtype) -> Tolerance:
        """The tolerance of a named result in `dtype` of a call whose first result is in `first`."""
        if result in self.tolerance_of:
            return self.tolerance_of[result][first]
        return self.tolerance.get(dtype, self.tolerance[first])


def _accept(signature: Signature) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Kernel:
    """One way to compute an operator.

    `provider` is its name among the operator's kernels ("reference", "torch", "onednn", "triton"...).
    `platforms` empty means any. `features` must all be stated by the device. `refuses` looks at the whole
    signature and answers None or the reason why not. `prepare` turns a constant weight into the form the
    kernel reads, once, when a model is built. `asks_host` says that it reads values of tensors on the
    host: a device graph cannot hold it. `take_rows` gives rows of a prepared weight as float32, by int64 numbers:
    an embedding that is tied to a head need not be held twice. `opaque`: what `prepare` gives is no tensor.
    `with_measured` gives the function that follows what was measured and keeps what it compiles on this machine, from
    the folder for both; the same function for the same folder. `compile_ahead` makes what calls of a signature lack,
    once for a machine, when a model is built: until then `refuses` says that it is not compiled. `compile_later` gives
    what calls of a signature may need on a device, each as a function that compiles it into the folder: others may do
    so before the first call. `compile_idle` gives functions of the same kind for what is compiled in this process,
    whose first steps it would delay: others may call them once these are done. `by_name`: it is bound only where it is
    asked for by name.
    """

    op: str
    provider: str
    function: Callable[..., Any]
    platforms: frozenset[str] = frozenset()
    features: frozenset[str] = frozenset()
    refuses: Callable[[Signature], str | None] = _accept
    prepare: Callable[[Any], Any] | None = None
    verified_on: tuple[str, ...] = ()
    asks_host: bool = False
    take_rows: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    opaque: bool = False
    with_measured: Callable[[Path], Callable[..., Any]] | None = None
    compile_ahead: Callable[[Signature], None] | None = None
    compile_later: Callable[[Signature, Path, torch.device], Iterable[Callable[[], object]]] | None = None
    compile_idle: Callable[[Signature, torch.device], Iterable[Callable[[], object]]] | None = None
    by_name: bool = False


FLOAT32_UNIT = 2.0**-24
"""Half a unit in the last place of float32, as a share of the value: the most that one rounding is off."""


def rounded(
    times: int, *, maths: float, absolute: float = 0.0, inside: float = 0.0
) -> Mapping[torch.dtype, Tolerance]:
    """Tolerances of float32 maths whose values are rounded `times` times to the result's dtype.

    `maths` bounds the relative error of the maths in FLOAT32_UNITs. `absolute` is what is lost where terms cancel,
    and where a value too small for full precision (below 6e-5 in float16) is multiplied after its rounding.
    `inside` is the size of what may be rounded to the dtype before it is summed.
    """
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        facts = torch.finfo(dtype)
        unit = facts.eps / 2
        found[dtype] = Tolerance(
            absolute=absolute + (inside + times * facts.tiny) * unit,
            relative=times * unit + maths * FLOAT32_UNIT,
        )
    return found
