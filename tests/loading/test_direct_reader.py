"""Weights read straight to a device against the same weights through a map: every type, slice and size of block."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gguf_files import tiny_model, write_gguf
from safetensors.torch import save_file

from lockstep.core.errors import ModelFileError
from lockstep.formats import open_model
from lockstep.formats.read_ahead import read_ahead, weight_files
from lockstep.layers.build import Place, Slice
from lockstep.models.loading.direct import DirectReader
from lockstep.models.loading.sources import StoredWeights
from lockstep.models.loading.weights import FileWeights
from lockstep.platforms.registry import load_platform

pytestmark = pytest.mark.suite("cpu", "sim", "cuda-1", seconds=15)

PARTS = (
    None,
    Slice(0, 0, 5),
    Slice(0, 40, 57),
    Slice(1, 0, 32),
    Slice(1, 17, 15),
    Slice(1, 63, 1),
)


@pytest.fixture(params=[64 * 4, 1000, 2**20], ids=lambda size: f"blocks of {size}")
def reader(request: pytest.FixtureRequest, suite_platform: str) -> Iterator[DirectReader]:
    family = load_platform(suite_platform)
    new_stream = family.new_stream if family.capabilities().has_streams else None
    made = DirectReader(family.device(), new_stream, num_threads=3, block_bytes=request.param)
    yield made
    made.close()


def make_model(directory: Path) -> Path:
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {
        "half.weight": drawn(97, 64).half(),
        "brain.weight": drawn(97, 64).bfloat16(),
        "single.weight": drawn(97, 64),
        "odd.weight": drawn(7, 3).bfloat16(),  # what follows starts at no multiple of four
        "last_norm.weight": drawn(33).bfloat16(),
        "experts": drawn(3, 20, 64).bfloat16(),
    }
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return directory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_the_same_values_by_both_paths(reader: DirectReader, dtype: torch.dtype, tmp_path: Path) -> None:
    files = open_model(make_model(tmp_path))
    mapped, direct = StoredWeights(FileWeights(files)), StoredWeights(FileWeights(files), reader)
    for name in ("half.weight", "brain.weight", "single.weight"):
        for part in PARTS:
            found, expected = (source.load(name, (97, 64), dtype, part) for source in (direct, mapped))
            assert found.device == reader.device and found.dtype == dtype
            assert torch.equal(found.cpu(), expected), (name, part)
    for name, shape in (("odd.weight", (7, 3)), ("last_norm.weight", (33,))):
        assert torch.equal(direct.load(name, shape, dtype, None).cpu(), mapped.load(name, shape, dtype, None))
    assert torch.equal(
        direct.load("last_norm.weight", (33,), dtype, Slice(0, 8, 9)).cpu(),
        mapped.load("last_norm.weight", (33,), dtype, Slice(0, 8, 9)),
    )


def test_many_at_once_to_where_they_belong(reader: DirectReader, tmp_path: Path) -> None:
    """Rows of one packed matrix, in inference mode as models are loaded."""
    files = open_model(make_model(tmp_path))
    direct = StoredWeights(FileWeights(files), reader)
    with torch.inference_mode():
        packed = torch.full((3, 30, 64), torch.nan, dtype=torch.bfloat16, device=reader.device)
        narrow = torch.full((3, 20, 7), torch.nan, dtype=torch.float32, device=reader.device)
        direct.fill(
            [Place(packed[at, 20:], "experts", (3, 20, 64), Slice(0, 4, 10, at)) for at in range(3)]
            + [Place(packed[at, :20], "experts", (3, 20, 64), Slice(0, 0, 20, 2 - at)) for at in range(3)]
            + [Place(narrow[at], "experts", (3, 20, 64), Slice(1, 50, 7, at)) for at in range(3)]
        )
    stored = FileWeights(files).load("experts", torch.bfloat16)
    assert torch.equal(packed.cpu(), torch.cat((stored.flip(0), stored[:, 4:14]), 1))
    assert torch.equal(narrow.cpu(), stored[:, :, 50:57].float())
    direct.require_all_used(but=set(files.tensors) - {"experts"})


def test_what_is_not_plain_comes_through_the_map(reader: DirectReader, tmp_path: Path) -> None:
    """Blocks of integers, rows in another order, norms with one added."""
    for architecture in ("llama", "gemma3"):
        files = open_model(write_gguf(tiny_model(architecture), tmp_path / f"{architecture}.gguf", "Q8_0"))
        direct, served = StoredWeights(FileWeights(files), reader), 0
        for name, info in files.tensors.items():
            served += reader.serves(info)
            found = direct.load(name, info.shape, torch.float32, None).cpu()
            assert torch.equal(found, FileWeights(files).load(name, torch.float32)), name
        assert served < len(files.tensors)


def test_a_file_that_became_shorter_is_named(reader: DirectReader, tmp_path: Path) -> None:
    files = open_model(make_model(tmp_path))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(files.tensors["single.weight"].offset + 100)
    with pytest.raises(ModelFileError, match=r"model\.safetensors: ended at byte \d+ while it was read"):
        StoredWeights(FileWeights(files), reader).load("single.weight", (97, 64), torch.float32, None)


def test_reading_ahead_names_the_files_of_weights_and_is_done_once(tmp_path: Path) -> None:
    assert read_ahead(tmp_path / "nothing") is None
    make_model(tmp_path)
    assert weight_files(tmp_path) == weight_files(tmp_path / "model.safetensors")
    thread = read_ahead(tmp_path)
    assert isinstance(thread, threading.Thread) and read_ahead(tmp_path) is thread
    thread.join(10)
    assert not thread.is_alive()
