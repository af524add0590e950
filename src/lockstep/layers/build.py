"""What a layer is given when it is made, and what it is given when it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from lockstep.attention.backend import AttentionBackend, AttentionSpec
from lockstep.core.probe import Probe, ProbePoint
from lockstep.kv.pool.pool import KVPool, KVShape
from lockstep.ops.contract import Signature
from lockstep.ops.grouped_weight import GroupedWeight
from lockstep.ops.selection import Binding, KernelSelector
from lockstep.parallel.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Slice:
    """A rank's part of a weight along one dim; with `member`, of one matrix of a stack, whose dims then count."""

    dim: int
    start: int
    length: int
    member: int | None = None


class Place(NamedTuple):
    """Where a weight, or a part of it, belongs: a contiguous tensor on the build's device, of the part's shape.

    `shape` is the whole weight's.
    """

    target: torch.Tensor
    name: str
    shape: tuple[int, ...]
    part: Slice | None = None


class Weights(Protocol):
    """Where weights come from: a file, shapes alone, or a seed."""

    def load(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, part: Slice | None) -> torch.Tensor:
        """The named weight of the given whole shape, or one part of it.

        Raises ModelFileError when it is missing or has another shape.
        """
        ...

    def load_grouped(self, name: str, shape: tuple[int, ...], part: Slice | None) -> GroupedWeight | None:
        """The same as integers with scales, where it is stored so and the part is whole blocks; else None."""
        ...


@runtime_checkable
class FillsPlaces(Protocol):
    """Weights that are read many at once, to where they belong."""

    def fill(self, places: Sequence[Place]) -> None:
        """Writes every place, in its target's dtype. Raises ModelFileError as Weights.load does."""
        ...


def fill_places(weights: Weights, places: Sequence[Place]) -> None:
    """Writes every place, one by one where the source knows no better. Raises ModelFileError as Weights.load does."""
    if isinstance(weights, FillsPlaces):
        weights.fill(places)
        return
    for target, name, shape, part in places:
        target.copy_(weights.load(name, shape, target.dtype, part))


@dataclass
class Build:
    """Everything a layer needs to make itself: its ranks, its device, its weights, its kernels.

    Layers call `weight`, `fill`, `bind`, `point` and `add_attention`; whoever owns the build reads the figures
    afterwards. `keep_grouped`: matrices of integers with scales stay so, for kernels that read them, and `quantise`
    makes plain ones such. `norm_dtype`: of norms' weights where it is not the model's dtype. `shared` holds what two
    layers have in common, such as tied embeddings, `left_to_others` the names of weights that only other ranks hold.
    """

    mesh: Mesh
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    weights: Weights
    kernels: KernelSelector
    context_length: int
    page_size: int = 16
    keep_grouped: bool = False
    quantise: Callable[[torch.Tensor], GroupedWeight] | None = None
    norm_dtype: torch.dtype | None = None
    probe: Probe | None = None
    on_weight: Callable[[str, int], None] | None = None
    kv_layers: list[KVShape] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    attention_signature: dict[str, Any] = field(default_factory=dict)
    new_heads: list[Signature | None] = field(default_factory=list)
    shared: dict[Any, Any] = field(default_factory=dict)
    left_to_others: set[str] = field(default_factory=set)
    weight_bytes: int = 0

    def weight(
        self, name: str, shape: tuple[int, ...], part: Slice | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """This rank's part of the weight `name`, on the device. `shape` is the whole weight's.

        Raises ModelFileError when the file lacks it or has another shape.
        """
        tensor = self.weights.load(name, shape, dtype or self.dtype, part)
        if self.on_weight is not None:
            self.on_weight(name, tensor.nbytes)
        self.weight_bytes += tensor.nbytes
        return tensor.to(self.device)

    def fill(self, places: Sequence[Place]) -> None:
        """Writes weights to where they belong on the device. Raises ModelFileError as `weight` does."""
        fill_places(self.weights, places)
        for place in places:
            if self.on_weight is not None:
                self.on_weight(place.name, place.target.nbytes)
            self.weight_bytes += place.target.nbytes

    def grouped_weight(
        self, name: str, shape: tuple[int, ...], part: Slice | None = None
    ) -> GroupedWeight | None:
        """This rank's part of a matrix in the integers that its file holds; None when it is to be used as values.

        Raises ModelFileError when the file lacks it or has another shape.
        """
        if not self.keep_grouped:
            return None
        weight = self.weights.load_grouped(name, shape, part)
        width = part.length if part is not None and part.dim == len(shape) - 1 else shape[-1]
        if weight is None and self.quantise is not None and width % 32 == 0:
            weight = self.quantise(self.weights.load(name, shape, torch.float32, part))
        if weight is not None:
            if self.on_weight is not None:
                self.on_weight(name, weight.num_bytes)
            self.weight_bytes += weight.num_bytes
        return weight

    def bind(self, op: str, where: str, **signature: Any) -> Binding:
        """The kernel for one call site."""
        described: Signature = {"dtype": self.dtype, **signature}
        return self.kernels.bind(op, where, described)

    def bind_fused(self, op: str, where: str, *, apart: str | None = None, **signature: Any) -> Binding | None:
        """One kernel for one call site, or None: its parts are to be bound in its place, for the reason `apart` too."""
        return self.kernels.bind_fused(op, where, {"dtype": self.dtype, **signature}, apart=apart)

    def point(
        self, name: str, axes: tuple[str, ...], placement: str = "replicated"
    ) -> Callable[[torch.Tensor], None] | None:
        """A probe point, or None when nobody watches it: the layer then does nothing there."""
        if self.probe is None:
            return None
        probe, point = self.probe, ProbePoint(name, axes, placement)
        return (lambda value: probe.record(point, value)) if probe.wants(point) else None

    def add_attention(
        self, shape: KVShape, num_heads: int, spec: AttentionSpec, new_heads: Signature | None = None
    ) -> int:
        """Registers a layer that attends; its number in the KV pool.

        `new_heads`: "dtype" and "weight_dtype" of heads that one kernel makes ready; None where several do.
        """
        self.kv_layers.append(shape)
        if spec.window not in self.windows:
            self.windows.append(spec.window)
        sizes = {"head_dim": shape.head_dim, "heads": num_heads, "kv_heads": shape.num_kv_heads}
        self.new_heads.append(None if new_heads is None else {**new_heads, **sizes})
        self.attention_signature = {
            "dtype": self.kv_dtype,
            "pool_dtype": self.kv_dtype,
            **sizes,
            "page_size": self.page_size,
            "window": max(spec.window, self.attention_signature.get("window", 0)),
            "soft_cap": max(spec.soft_cap, self.attention_signature.get("soft_cap", 0.0)),
            "sinks": spec.sinks_N is not None or self.attention_signature.get("sinks", False),
        }
        return len(self.kv_layers) - 1

    @property
    def fresh_signature(self) -> Signature | None:
        """Of norm_rope_attention_decode, for a kernel that serves every registered layer; None where none can.

        One kernel has to make new heads ready in each of them, and of heads of one kind.
        """
        first = self.new_heads[0] if self.new_heads else None
        if first is None or any(kind != first for kind in self.new_heads):
            return None
        return {**self.attention_signature, **first}


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """One step, as layers see it. Passed explicitly; there is no other.

    positions_T and slots_T (int64) name each row's place in its sequence and in the KV pool. `plan` is the
    attention backend's. wanted_R (int64) numbers the rows whose hidden state is read, in the order in which it is;
    None stands for all rows.
    """

    positions_T: torch.Tensor
    slots_T: torch.Tensor
    attention: AttentionBackend
    plan: Any
    kv: KVPool
    wanted_R: torch.Tensor | None = None

    def keep_wanted(self, values: torch.Tensor) -> torch.Tensor:
        """Of values of all rows [T, ...], those of the wanted ones."""
        return values if self.wanted_R is None else values.index_select(0, self.wanted_R)
