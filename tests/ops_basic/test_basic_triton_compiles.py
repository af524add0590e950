"""The Triton programs through Triton's compiler, which needs no GPU and refuses what its interpreter lets pass."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from lockstep.ops.rope.tiles import tile_of as rope_tile
from lockstep.ops.rows import Tile, elementwise_tile, whole_row_tile

pytestmark = pytest.mark.suite("cpu")

triton = pytest.importorskip("triton")

HOPPER = ("cuda", 90, 32)
MI300 = ("hip", "gfx942", 64)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(
    op: str, program: str, dtypes: dict[str, str], constants: dict[str, Any], num_warps: int, target: Any
) -> str:
    """The assembly for a target. Pointers are in bfloat16 unless `dtypes` says else; sizes are multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"lockstep.ops.{op}.programs"), program)
    names = function.arg_names
    kinds = {name: "*bf16" if name.endswith("_ptr") else "i32" for name in names}
    kinds |= dtypes | dict.fromkeys(constants, "constexpr")
    aligned = [at for at, name in enumerate(names) if kinds[name].startswith(("*", "i32"))]
    attributes = {(at,): [["tt.divisibility", 16]] for at in aligned}
    source = ASTSource(function, kinds, constexprs=constants, attrs=attributes)
    assembly = triton.compile(source, target=GPUTarget(*target), options={"num_warps": num_warps}).asm
    return str(assembly["ptx" if target[0] == "cuda" else "amdgcn"])


def norm(op: str, tile: Tile, target: Any) -> str:
    program = {"rms_norm": "_rms_norm", "add_rms_norm": "_add_rms_norm", "layer_norm": "_layer_norm"}[op]
    constants: dict[str, Any] = {"ROWS": tile.rows, "BLOCK": tile.block}
    if op == "add_rms_norm":
        constants["PDL"] = False
    places = ("update_", "residual_") if op == "add_rms_norm" else ("",)
    for place in places:
        constants |= {f"{place}inner": 1, f"{place}column_stride": 1}
    if op == "layer_norm":
        constants |= {"HAS_WEIGHT": True, "HAS_BIAS": True}
    return compiled(op, program, {"eps": "fp32"}, constants, tile.num_warps, target)


def activation(number: int, target: Any) -> str:
    tile = elementwise_tile(8192, 14336)
    sizes = {"ROWS": tile.rows, "BLOCK": tile.block, "inner": 1, "column_stride": 1}
    constants = {"PDL": False, "ACTIVATION": number, **sizes}
    return compiled("silu_and_mul", "_activate_and_multiply", {}, constants, tile.num_warps, target)


def rotation(target: Any, *, interleaved: bool, rotated: int) -> str:
    tile = rope_tile(8192, 40, 128)
    constants = {
        "x_element_stride": 1,
        "HEAD_DIM": 128,
        "HALF": rotated // 2,
        "INTERLEAVED": interleaved,
        "HEADS": tile.heads,
        "BLOCK_HALF": rotated // 2,
        "BLOCK_REST": max(128 - rotated, 1),
    }
    dtypes = {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    return compiled("rope", "_rotate", dtypes, constants, tile.num_warps, target)


def storing(target: Any) -> str:
    constants = dict.fromkeys(("k_element_stride", "v_element_stride", "slots_stride"), 1)
    constants |= dict.fromkeys(("k_pool_element_stride", "v_pool_element_stride"), 1)
    constants |= {"K_HEAD_DIM": 128, "V_HEAD_DIM": 128, "K_BLOCK": 128, "V_BLOCK": 128}
    constants |= {"PAGE_SIZE": 16, "HEADS": 8}
    return compiled("kv_store", "_store", {"slots_ptr": "*i64"}, constants, 4, target)


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "layer_norm"])
@pytest.mark.parametrize(("rows", "width"), [(16384, 4096), (16384, 128), (1, 4096)])
def test_norms_read_and_write_16_bytes_at_a_time(op: str, rows: int, width: int) -> None:
    tile = whole_row_tile(rows, width)
    ptx = norm(op, tile, HOPPER)
    per_thread = tile.rows * tile.block // (32 * tile.num_warps) // 8
    stored = 2 if op == "add_rms_norm" else 1
    assert ptx.count("st.global.v4.b32") == per_thread * stored
    assert ptx.count("ld.global.v4.b32") >= per_thread * stored


@pytest.mark.parametrize("number", [0, 1, 2], ids=["silu", "gelu", "gelu tanh"])
def test_activations_read_and_write_16_bytes_at_a_time(number: int) -> None:
    ptx = activation(number, HOPPER)
    assert ptx.count("ld.global.v4.b32") == 4 and ptx.count("st.global.v4.b32") == 2


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [128, 64])
def test_rope_reads_and_writes_several_elements_at_a_time(interleaved: bool, rotated: int) -> None:
    """Halves of a half-rotated head are too short for 16 bytes per thread; single elements are never moved."""
    ptx = rotation(HOPPER, interleaved=interleaved, rotated=rotated)
    assert ptx.count("st.global.v4.b32") == (1 if rotated == 64 and not interleaved else 2)
    assert ".global.b16" not in ptx


def test_kv_store_reads_and_writes_16_bytes_at_a_time() -> None:
    ptx = storing(HOPPER)
    assert ptx.count("ld.global.v4.b32") == 2 and ptx.count("st.global.v4.b32") == 2


def test_programs_compile_for_another_vendor() -> None:
    assemblies = [
        norm(op, whole_row_tile(16384, 4096), MI300) for op in ("rms_norm", "add_rms_norm", "layer_norm")
    ]
    assemblies += [activation(number, MI300) for number in range(3)]
    assemblies += [rotation(MI300, interleaved=True, rotated=128)]
    for assembly in assemblies:
        assert "_load_dwordx4" in assembly and "_store_dwordx4" in assembly
    assert "_store_dwordx2" in storing(MI300)
