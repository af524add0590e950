"""Block formats against the gguf package's own dequantiser."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from lockstep.core.errors import ModelFileError
from lockstep.formats.storage import BLOCK_LAYOUTS, GGML_TYPE_NAMES, WIDENED_BLOCK_BYTES
from lockstep.quantization.storage_types import STORAGE_TYPES, storage_type

pytestmark = pytest.mark.suite("cpu")

PACKED = [name for name, storage in STORAGE_TYPES.items() if storage.is_packed]
HALF_FIELDS = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
SEED = 20240607


def random_rows(name: str, num_rows: int = 33, blocks_per_row: int = 3) -> np.ndarray:
    """Rows of random bits whose scales are finite half-precision numbers of either sign, tiny ones included."""
    print(f"seed {SEED}")
    generator = np.random.default_rng(SEED)
    layout = BLOCK_LAYOUTS[name]
    blocks = generator.integers(0, 256, (num_rows * blocks_per_row, layout.num_bytes), dtype=np.uint8)
    for at in HALF_FIELDS.get(name, (0,)):
        scales = generator.standard_normal(len(blocks)) * 10.0 ** generator.integers(-6, 3, len(blocks))
        blocks[:, at : at + 2] = scales.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(num_rows, -1)


def reference(name: str, rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[name])))


def test_block_layouts_are_those_of_the_gguf_package() -> None:
    assert set(BLOCK_LAYOUTS) == set(GGML_TYPE_NAMES.values()) == set(STORAGE_TYPES)
    for type_id, name in GGML_TYPE_NAMES.items():
        kind = gguf.GGMLQuantizationType(type_id)
        assert kind.name == name
        assert gguf.GGML_QUANT_SIZES[kind] == BLOCK_LAYOUTS[name]


@pytest.mark.parametrize("name", PACKED)
def test_random_blocks_become_the_reference_values_to_the_last_bit(name: str) -> None:
    rows = random_rows(name)
    expected = reference(name, rows)
    raw = torch.from_numpy(rows)
    assert torch.equal(storage_type(name).dequantise(raw, torch.float32), expected)
    assert torch.equal(storage_type(name).dequantise(raw, torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("name", PACKED)
def test_many_pieces_give_the_values_of_one(name: str) -> None:
    storage = storage_type(name)
    rows = torch.from_numpy(random_rows(name, num_rows=40)).repeat(60, 4)
    values = storage.dequantise(rows, torch.float32)
    assert values.numel() > 2 * 131072, "the case must span several pieces"
    assert torch.equal(
        values[-40:, -values.shape[1] // 4 :], reference(name, rows[-40:, -rows.shape[1] // 4 :].numpy())
    )


@pytest.mark.parametrize("name", PACKED)
def test_unpacked_integers_scales_and_minima_make_the_values(name: str) -> None:
    rows = random_rows(name)
    q, scale, minimum = storage_type(name).unpack(torch.from_numpy(rows))
    assert q.dtype in (torch.int8, torch.uint8) and scale.dtype == torch.float32
    assert q.shape[0] == scale.shape[0] == 33
    group = q.shape[1] // scale.shape[1]
    assert group == (16 if name == "Q6_K" else 32)
    values = q.double() * scale.double().repeat_interleave(group, dim=1)
    if minimum is not None:
        values = values + minimum.double().repeat_interleave(group, dim=1)
    torch.testing.assert_close(values, reference(name, rows).double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_real_values_survive_quantising(name: str) -> None:
    print(f"seed {SEED}")
    values = np.random.default_rng(SEED).standard_normal((16, 256), dtype=np.float32)
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
    found = storage_type(name).dequantise(torch.from_numpy(packed), torch.float32)
    step = np.abs(values).max() / {"8": 127, "5": 15, "4": 7}[name[1]]
    assert (found - torch.from_numpy(values)).abs().max() <= step


@pytest.mark.parametrize(
    ("name", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)]
)
def test_plain_values_are_read_as_they_are(name: str, dtype: torch.dtype) -> None:
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(3)).to(dtype)
    raw = values.view(torch.uint8)
    assert torch.equal(storage_type(name).dequantise(raw, dtype), values)
    assert torch.equal(storage_type(name).dequantise(raw, torch.float32), values.float())
    with pytest.raises(ModelFileError, match="nothing to unpack"):
        storage_type(name).unpack(raw)


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    storage = storage_type("Q4_K")
    assert storage.row_bytes(512) == 288 and storage.num_columns(288) == 512
    with pytest.raises(ModelFileError, match="whole Q4_K blocks of 256"):
        storage.row_bytes(500)
    with pytest.raises(ModelFileError, match="whole Q4_K blocks of 144"):
        storage.dequantise(torch.zeros(2, 143, dtype=torch.uint8), torch.float32)


def test_an_unknown_type_names_the_nearest() -> None:
    with pytest.raises(ModelFileError, match="did you mean 'Q4_K'"):
        storage_type("Q4_KM")


@pytest.mark.parametrize("name", PACKED)
def test_what_a_block_takes_in_memory_is_known(name: str) -> None:
    """Of kernels that read it: packed integers, scales and minima in 16 bits."""
    storage = STORAGE_TYPES[name]
    held = storage.grouped(torch.zeros(1, storage.block_bytes, dtype=torch.uint8))
    num_groups = held.scale_OG.numel() * (1 if held.minimum_OG is None else 2)
    num_bytes = storage.block_elements * storage.bits // 8 + 2 * num_groups
    assert num_bytes == WIDENED_BLOCK_BYTES.get(name, storage.block_bytes)
