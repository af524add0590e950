"""Sources of weights for a build: a model's files, shapes alone, a seed, or dummies."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Sequence

import torch

from lockstep.core.errors import ModelFileError
from lockstep.layers.build import Place, Slice
from lockstep.models.loading.direct import DirectReader, Reading
from lockstep.models.loading.weights import Rectangle, WeightSource, stays_grouped, storage_type_of
from lockstep.ops.grouped_weight import GroupedWeight


def _part_shape(shape: tuple[int, ...], part: Slice | None) -> tuple[int, ...]:
    if part is None:
        return shape
    whole = shape if part.member is None else shape[1:]
    return (*whole[: part.dim], part.length, *whole[part.dim + 1 :])


class StoredWeights:
    """Weights of a model's files, and a record of which were asked for.

    With a `reader` plain values are read straight to its device; others, and all of them without one, by the source.
    """

    def __init__(self, source: WeightSource, reader: DirectReader | None = None) -> None:
        self._source = source
        self._reader = reader
        self._used: set[str] = set()

    def load(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, part: Slice | None) -> torch.Tensor:
        self._take(name, shape)
        if self._reader is not None and self._reader.serves(self._source.info(name)):
            target = torch.empty(_part_shape(shape, part), dtype=dtype, device=self._reader.device)
            self._reader.read([self._reading(Place(target, name, shape, part))])
            return target
        if part is None:
            return self._source.load(name, dtype)
        return self._source.load(
            name, dtype, dim=part.dim, start=part.start, length=part.length, member=part.member
        )

    def fill(self, places: Sequence[Place]) -> None:
        for place in places:
            self._take(place.name, place.shape)
        readings = []
        for place in places:
            if self._reader is not None and self._reader.serves(self._source.info(place.name)):
                readings.append(self._reading(place))
            else:
                place.target.copy_(self.load(place.name, place.shape, place.target.dtype, place.part))
        if self._reader is not None:
            self._reader.read(readings)

    def close(self) -> None:
        """Ends the reader, if there is one, and gives back what was read of the files: by now it was copied, or it is
        a view, which is read again when it is used. May be called twice."""
        for name in self._used:
            self._source.forget(name)
        if self._reader is not None:
            self._reader.close()

    def _reading(self, place: Place) -> Reading:
        info, part = self._source.info(place.name), place.part
        if part is None:
            return Reading(place.target, info, Rectangle.of(info, None, 0, None))
        return Reading(place.target, info, Rectangle.of(info, part.dim, part.start, part.length, part.member))

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

    def fill(self, places: Sequence[Place]) -> None:
        """There are no values to write."""


class RandomWeights:
    """Normal values (std 0.02, norms near one) that depend on the seed and the name alone: a model that computes."""

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


class DummyWeights:
    """Weights that nobody trained, made on the device as fast as it writes memory: for measuring speed.

    Values are uniform between -0.001 and 0.001 and norms one, so that no sum grows out of bounds. A weight's values
    depend on its name and their places in it alone: they are the same on every device, and a part of it is that part.
    All of them repeat after 4,194,301 values, a prime number, from a place that the name decides: no two rows that
    follow each other are alike. `device` is where they are made.
    """

    _PERIOD = 4_194_301
    _LARGEST = 1e-3

    def __init__(self, device: torch.device) -> None:
        drawn = torch.rand(self._PERIOD, generator=torch.Generator().manual_seed(0))
        self._values = ((2 * drawn - 1) * self._LARGEST).to(device)
        self._by_dtype = {self._values.dtype: self._values}

    def load(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, part: Slice | None) -> torch.Tensor:
        target = torch.empty(_part_shape(shape, part), dtype=dtype, device=self._values.device)
        self.fill([Place(target, name, shape, part)])
        return target

    def load_grouped(self, name: str, shape: tuple[int, ...], part: Slice | None) -> None:
        """Values are plain ones."""

    def fill(self, places: Sequence[Place]) -> None:
        for target, name, shape, part in places:
            if name.endswith("norm.weight"):
                target.fill_(1.0)
                continue
            whole, before = _within(shape, part)
            first = zlib.crc32(name.encode()) + before
            if part is None or part.dim == 0:
                per_entry = math.prod(whole[1:])
                self._repeat(target.view(-1), first + (part.start if part is not None else 0) * per_entry)
            else:
                rows = torch.empty(whole, dtype=target.dtype, device=target.device)
                self._repeat(rows.view(-1), first)
                target.copy_(rows.narrow(part.dim, part.start, part.length))

    def _repeat(self, target: torch.Tensor, first: int) -> None:
        """Writes the values from number `first` on."""
        if target.dtype not in self._by_dtype:
            self._by_dtype[target.dtype] = self._values.to(target.dtype)
        values = self._by_dtype[target.dtype]
        at, begin = 0, first % self._PERIOD
        while at < len(target):
            count = min(self._PERIOD - begin, len(target) - at)
            target[at : at + count].copy_(values[begin : begin + count])
            at, begin = at + count, 0


def _within(shape: tuple[int, ...], part: Slice | None) -> tuple[tuple[int, ...], int]:
    """The shape that a part's dims count in, and how many values lie before it: one matrix of a stack, or all."""
    if part is None or part.member is None:
        return shape, 0
    return shape[1:], part.member * math.prod(shape[1:])
