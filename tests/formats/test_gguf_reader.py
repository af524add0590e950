"""The GGUF header reader, against the gguf package and against broken files."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFEndian, GGUFValueType, GGUFWriter
from gguf_files import tiny_model, write_gguf

from lockstep.core.errors import ModelFileError
from lockstep.formats import embedded_model_path, open_model
from lockstep.formats.gguf_reader import read_gguf_header
from lockstep.formats.storage import StoredTensor

pytestmark = pytest.mark.suite("cpu")

SCALARS = {
    GGUFValueType.UINT8: 200,
    GGUFValueType.INT8: -100,
    GGUFValueType.UINT16: 60000,
    GGUFValueType.INT16: -30000,
    GGUFValueType.UINT32: 4_000_000_000,
    GGUFValueType.INT32: -2_000_000_000,
    GGUFValueType.FLOAT32: 0.15625,
    GGUFValueType.BOOL: True,
    GGUFValueType.STRING: "naïve 漢字",
    GGUFValueType.UINT64: 2**64 - 1,
    GGUFValueType.INT64: -(2**63),
    GGUFValueType.FLOAT64: 1e-300,
}


def write(path: Path, *, alignment: int | None = None, endianess: GGUFEndian = GGUFEndian.LITTLE) -> Path:
    """A file with every kind of value and three tensors."""
    writer = GGUFWriter(path, "llama", endianess=endianess)
    if alignment:
        writer.add_custom_alignment(alignment)
    for kind, value in SCALARS.items():
        writer.add_key_value(f"scalar.{kind.name}", value, kind)
        if kind is not GGUFValueType.BOOL:
            writer.add_key_value(f"array.{kind.name}", [value, value, value], GGUFValueType.ARRAY, kind)
    writer.add_array("array.BOOL", [True, False, True])
    writer.add_tensor("first", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("second", np.arange(5, dtype=np.float16))
    packed = np.zeros((4, 2 * 18), dtype=np.uint8)
    writer.add_tensor("third", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_kind_of_value_is_read(tmp_path: Path) -> None:
    metadata = read_gguf_header(write(tmp_path / "a.gguf")).metadata
    for kind, value in SCALARS.items():
        assert metadata[f"scalar.{kind.name}"] == value
        assert type(metadata[f"scalar.{kind.name}"]) is type(value)
        if kind is not GGUFValueType.BOOL:
            assert metadata[f"array.{kind.name}"] == [value, value, value]
    assert metadata["array.BOOL"] == [True, False, True]


@pytest.mark.parametrize("alignment", [None, 64, 4096])
def test_tensors_lie_where_they_were_written(alignment: int | None, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", alignment=alignment)
    first, second, third = read_gguf_header(path).tensors
    content = path.read_bytes()
    assert first[:3] == ("first", "F32", (2, 3))
    assert np.array_equal(np.frombuffer(content, np.float32, 6, first.offset), np.arange(6))
    assert second[:3] == ("second", "F16", (5,))
    assert np.array_equal(np.frombuffer(content, np.float16, 5, second.offset), np.arange(5))
    assert third[:3] == ("third", "Q4_0", (4, 64)) and third.nbytes == 4 * 36
    assert all(tensor.offset % (alignment or 32) == 0 for tensor in (first, second, third))


def test_the_embedded_model_reads_as_the_gguf_package_reads_it() -> None:
    path = embedded_model_path()
    found, expected = read_gguf_header(path), gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in expected.fields.items() if not name.startswith("GGUF.")}
    assert found.metadata == fields
    assert found.tensors == [
        StoredTensor(
            tensor.name,
            tensor.tensor_type.name,
            tuple(int(size) for size in reversed(tensor.shape)),
            tensor.data_offset,
            tensor.n_bytes,
        )
        for tensor in expected.tensors
    ]


@pytest.mark.suite("cpu", exclusive=True)
def test_opening_the_embedded_model_is_quick() -> None:
    path = embedded_model_path()
    timings = []
    for _ in range(3):
        start = time.perf_counter()
        open_model(path)
        timings.append(time.perf_counter() - start)
    print(f"opening took {min(timings):.3f} s")
    assert min(timings) < 0.25


def test_version_2_reads_like_version_3(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf")
    expected = read_gguf_header(path)
    content = bytearray(path.read_bytes())
    content[4] = 2
    path.write_bytes(content)
    assert read_gguf_header(path) == expected


def test_arrays_of_arrays_are_read_and_their_depth_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "nested.gguf"

    def nested(depth: int) -> bytes:
        """An array within arrays, `depth` deep, with the one byte 7 inside."""
        levels = struct.pack("<IQ", 9, 1) * (depth - 1)
        return header(0, 1) + pair("nested", 9, levels + struct.pack("<IQB", 0, 1, 7))

    path.write_bytes(nested(3))
    assert read_gguf_header(path).metadata == {"nested": [[[7]]]}
    path.write_bytes(nested(2000))
    with pytest.raises(ModelFileError, match="nested deeper"):
        read_gguf_header(path)


def header(num_tensors: int, num_pairs: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_pairs)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key.encode()) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name.encode()) + dims + struct.pack("<IQ", kind, offset)


BROKEN = {
    "empty": (b"", "too short"),
    "magic": (b"GGML" + bytes(40), "not a GGUF file"),
    "version": (header(0, 0, version=7) + bytes(8), "version 7"),
    "pairs": (header(0, 2**60) + bytes(64), r"\d+ metadata entries .* cannot fit"),
    "tensors": (header(2**60, 0) + bytes(64), r"\d+ tensors .* cannot fit"),
    "key": (header(0, 1) + struct.pack("<Q", 2**40) + bytes(64), "name at byte 24 would have"),
    "string": (header(0, 1) + pair("k", 8, struct.pack("<Q", 2**40)) + bytes(64), "runs past the end"),
    "utf8": (header(0, 1) + pair("k", 8, text(b"\xff\xfe")) + bytes(64), "not UTF-8"),
    "array": (header(0, 1) + pair("k", 9, struct.pack("<IQ", 0, 2**40)) + bytes(64), "more than 4194304"),
    "array end": (header(0, 1) + pair("k", 9, struct.pack("<IQ", 5, 2**20)) + bytes(64), "cannot fit"),
    "strings": (header(0, 1) + pair("k", 9, struct.pack("<IQ", 8, 2**20)) + bytes(64), "cannot fit"),
    "kind": (header(0, 1) + pair("k", 99, bytes(64)), "value type 99"),
    "twice": (header(0, 2) + pair("k", 0, b"1") * 2 + bytes(64), "'k' appears twice"),
    "alignment": (
        header(0, 1) + pair("general.alignment", 4, struct.pack("<I", 48)) + bytes(64),
        "power of two",
    ),
    "dims": (header(1, 0) + tensor("t", (1,) * 5, 0, 0) + bytes(64), "5 dims"),
    "zero": (header(1, 0) + tensor("t", (4, 0), 0, 0) + bytes(64), "cannot be stored"),
    "block": (header(1, 0) + tensor("t", (4, 33), 2, 0) + bytes(256), "cannot be stored as Q4_0"),
    "vector": (header(1, 0) + tensor("t", (32,), 2, 0) + bytes(256), "cannot be stored as Q4_0"),
    "IQ type": (header(1, 0) + tensor("t", (1, 256), 23, 0) + bytes(256), "stored as IQ4_XS"),
    "type": (header(1, 0) + tensor("t", (1, 256), 77, 0) + bytes(256), "unknown type 77"),
    "unaligned": (header(1, 0) + tensor("t", (4,), 0, 8) + bytes(256), "not aligned to 32"),
    "past": (header(1, 0) + tensor("t", (2**40, 2**20), 0, 0) + bytes(256), "ends at byte .* truncated"),
    "overlap": (
        header(2, 0) + tensor("t", (16,), 0, 0) + tensor("u", (16,), 0, 32) + bytes(256),
        "'u' overlaps 't'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_with_its_name_and_what_is_wrong(case: str, tmp_path: Path) -> None:
    content, problem = BROKEN[case]
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=problem) as caught:
        read_gguf_header(path)
    assert "broken.gguf" in str(caught.value) and "\n" not in str(caught.value)


def test_big_endian_files_are_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", endianess=GGUFEndian.BIG)
    with pytest.raises(ModelFileError, match="big-endian"):
        read_gguf_header(path)


def outcome(path: Path, content: bytes) -> str:
    """Opens the bytes as a model: "opened" or the refusal. Any other exception fails the test."""
    # A file that is written over waits for the disk.
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    try:
        open_model(path)
    except ModelFileError as error:
        return str(error)
    return "opened"


def small_model(path: Path) -> bytes:
    def add_tokenizer(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([f"token {index}" for index in range(96)])
        writer.add_token_types([3] * 4 + [1] * 92)
        writer.add_eos_token_id(2)

    scaling = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = tiny_model("llama", rope_parameters=scaling, max_position_embeddings=16384)
    return write_gguf(model, path, "Q4_1", add=add_tokenizer).read_bytes()


def test_a_tensor_stored_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.gguf"
    content = small_model(path).replace(b"blk.1.attn_v.weight", b"blk.1.attn_k.weight")
    assert "twice.gguf: tensor 'blk.1.attn_k.weight' is stored twice" in outcome(path, content)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    content = small_model(path)
    assert outcome(path, content) == "opened"
    lengths = sorted({*range(0, 3000, 7), *range(3000, len(content), 997), len(content) - 1})
    for length in lengths:
        refusal = outcome(path, content[:length])
        assert refusal != "opened" and "cut.gguf" in refusal and "\n" not in refusal, length


def test_flipped_bytes_never_cost_more_than_a_refusal(tmp_path: Path) -> None:
    seed = 7
    print(f"seed {seed}")
    generator = random.Random(seed)
    path = tmp_path / "flipped.gguf"
    original = small_model(path)
    header_bytes = min(info.offset for info in open_model(path).tensors.values())
    outcomes = []
    start = time.process_time()
    tracemalloc.start()
    for _ in range(1500):
        content = bytearray(original)
        for _ in range(generator.randint(1, 4)):
            content[generator.randrange(header_bytes)] = generator.choice(
                (0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256))
            )
        outcomes.append(outcome(path, bytes(content)))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"peak {peak_bytes} bytes, {time.process_time() - start:.1f} s, {outcomes.count('opened')} opened")
    assert all(text == "opened" or ("flipped.gguf" in text and len(text) < 1000) for text in outcomes)
    assert 0 < outcomes.count("opened") < len(outcomes)
    assert peak_bytes < 20 * len(original)
    assert time.process_time() - start < 60
