"""Sources of weights for a build: a model's files, shapes alone, or a seed."""

from __future__ import annotations

import zlib

import torch

from lockstep.core.errors import ModelFileError
from lockstep.layers.build import Slice
from lockstep.models.loading.weights import WeightSource


def _part_shape(shape: tuple[int, ...], part: Slice | None) -> tuple[int, ...]:
    return shape if part is None else (*shape[: part.dim], part.length, *shape[part.dim + 1 :])


class StoredWeights:
    """Weights of a model's files, and a record of which were asked for."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._used: set[str] = set()

    def load(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, part: Slice | None) -> torch.Tensor:
        stored = tuple(self._source.info(name).shape)
        if stored != shape:
            raise ModelFileError(
                f"weight {name} has shape {list(stored)}, but the model's config needs {list(shape)}"
            )
        self._used.add(name)
        if part is None:
            return self._source.load(name, dtype)
        return self._source.load(name, dtype, dim=part.dim, start=part.start, length=part.length)

    def require_all_used(self) -> None:
        """Raises ModelFileError when a stored weight was taken by no layer: the model would silently be another one.

        Tables that are computed anew, and a head that repeats the embedding, may stay behind.
        """
        unused = [name for name in self._source.names() if name not in self._used and not _may_stay(name)]
        if unused:
            raise ModelFileError(
                f"no layer takes the stored weight {unused[0]}{f' and {len(unused) - 1} more' if unused[1:] else ''}: "
                "this variant of the architecture is not supported"
            )


def _may_stay(name: str) -> bool:
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")


class ShapeWeights:
    """Weights with shapes and no values, on the meta device: for building a model with no files and no devices."""

    def load(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, part: Slice | None) -> torch.Tensor:
        return torch.empty(_part_shape(shape, part), dtype=dtype, device="meta")


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
            values = values.narrow(part.dim, part.start, part.length)
        return values.to(dtype).contiguous()
