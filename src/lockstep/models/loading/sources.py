"""Sources of weights for a build: a model's files, shapes alone, or a seed."""

from __future__ import annotations

import zlib
from collections.abc import Collection

import torch

from lockstep.core.errors import ModelFileError
from lockstep.layers.build import Slice
from lockstep.models.loading.weights import WeightSource, stays_grouped, storage_type_of
from lockstep.ops.grouped_weight import GroupedWeight


def _part_shape(shape: tuple[int, ...], part: Slice | None) -> tuple[int, ...]:
    if part is None:
        return shape
    whole = shape if part.member is None else shape[1:]
    return (*whole[: part.dim], part.length, *whole[part.dim + 1 :])


class StoredWeights:
    """Weights of a model's files, and a record of which were asked for."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._used: set[str] = set()

    def load(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, part: Slice | None) -> torch.Tensor:
        self._take(name, shape)
        if part is None:
            return self._source.load(name, dtype)
        return self._source.load(
            name, dtype, dim=part.dim, start=part.start, length=part.length, member=part.member
        )

    def load_grouped(self, name: str, shape: tuple[int, ...], part: Slice | None) -> GroupedWeight | None:
        if not stays_grouped(self._source.info(name), part):
            return None
        self._take(name, shape)
        if part is None:
            data, storage = self._source.raw(name)
        else:
            data, storage = self._source.raw(name, dim=part.dim, start=part.start, length=part.length)
        weight = storage.grouped(data)
        self._source.forget(name)
        return weight

    def _take(self, name: str, shape: tuple[int, ...]) -> None:
        stored = tuple(self._source.info(name).shape)
        if stored != shape:
            raise ModelFileError(
                f"weight {name} has shape {list(stored)}, but the model's config needs {list(shape)}"
            )
        self._used.add(name)

    def require_all_used(self, but: Collection[str] = ()) -> None:
        """Raises ModelFileError when a stored weight was taken by no layer: the model would silently be another one.

        Tables that are computed anew, a head that repeats the embedding, and weights named in `but` may stay behind.
        """
        taken = self._used.union(but)
        unused = [name for name in self._source.names() if name not in taken and not _may_stay(name)]
        if unused:
            raise ModelFileError(
                f"no layer takes the stored weight {unused[0]}{f' and {len(unused) - 1} more' if unused[1:] else ''}: "
                "this variant of the architecture is not supported"
            )


def _may_stay(name: str) -> bool:
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")


class ShapeWeights:
    """Weights with shapes and no values, on the meta device: for building a model with no devices.

    Given a source, matrices of integers with scales are such as in its files; no byte of them is read.
    """

    def __init__(self, source: WeightSource | None = None) -> None:
        self._source = source

    def load(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, part: Slice | None) -> torch.Tensor:
        return torch.empty(_part_shape(shape, part), dtype=dtype, device="meta")

    def load_grouped(self, name: str, shape: tuple[int, ...], part: Slice | None) -> GroupedWeight | None:
        if self._source is None or not stays_grouped(self._source.info(name), part):
            return None
        storage = storage_type_of(self._source.info(name))
        num_rows, num_columns = _part_shape(shape, part)
        return storage.grouped(
            torch.empty(num_rows, storage.row_bytes(num_columns), dtype=torch.uint8, device="meta")
        )


class RandomWeights:
    """Normal values (std 0.02, norms near one) that depend on the seed and the name alone: for benchmarks."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def load(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, part: Slice | None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self._seed * 2**32 + zlib.crc32(name.encode()))
        values = torch.randn(shape, generator=generator) * 0.02
        if name.endswith("norm.weight"):
            values += 1
        if part is not None:
            whole = values if part.member is None else values[part.member]
            values = whole.narrow(part.dim, part.start, part.length)
        return values.to(dtype).contiguous()

    def load_grouped(self, name: str, shape: tuple[int, ...], part: Slice | None) -> None:
        """Drawn values are plain ones."""
