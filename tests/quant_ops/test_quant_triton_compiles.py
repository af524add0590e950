"""The Triton programs through Triton's compiler, which needs no GPU and refuses what its interpreter lets pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lockstep.ops.per_token_group_quant_fp8.tiles import tile_of as group_tile
from lockstep.ops.scaled_mm_fp8.tiles import tile_of as product_tile

pytestmark = pytest.mark.suite("cpu")

HOPPER = ("cuda", 90, 32)
MI300 = ("hip", "gfx942", 64)
# Triton's words for dtypes, and the largest codes.
E4M3, INT8, LARGEST = "*fp8e4nv", "*i8", {"*fp8e4nv": 448.0, "*i8": 127.0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(
    program: Any, pointers: dict[str, str], constants: dict[str, Any], target: Any, **options: Any
) -> str:
    """The assembly for a target. What is neither pointer nor constant is an int32; all but counts are aligned."""
    names = program.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = [at for at, name in enumerate(names) if name in pointers or name.endswith(("stride", "puts"))]
    attributes = {(at,): [["tt.divisibility", 16]] for at in aligned if names[at] not in constants}
    source = ASTSource(program, signature, constexprs=constants, attrs=attributes)
    assembly = triton.compile(source, target=GPUTarget(*target), options=options).asm
    return str(assembly["ptx" if target[0] == "cuda" else "amdgcn"])


def quantiser(x: str, codes: str, rows: int, width: int, group: int, target: Any, *, ue8m0: bool) -> str:
    from lockstep.ops.per_token_group_quant_fp8.programs import _quantise_groups

    tile = group_tile(rows, width // group, group)
    constants = {
        "x_column_stride": 1,
        "scale_group_stride": 1,
        "GROUP": group,
        "BLOCK": tile.block,
        "TILE_ROWS": tile.rows,
        "TILE_GROUPS": tile.groups,
        "LIMIT": LARGEST[codes],
        "SMALLEST": 2.0**-40,
        "UE8M0": ue8m0,
    }
    pointers = {"x_ptr": x, "codes_ptr": codes, "scale_ptr": "*fp32"}
    options = {"num_warps": tile.num_warps, "enable_fp_fusion": False}
    return compiled(_quantise_groups, pointers, constants, target, **options)


def product(rows: int, outputs: int, out: str, target: Any, *, blocks: bool, even: bool) -> str:
    from lockstep.ops.scaled_mm_fp8.programs import _scaled_product

    tile = product_tile(rows, outputs)
    constants = {
        "a_input_stride": 1,
        "b_input_stride": 1,
        "SCALED_BLOCKS": blocks,
        "OUTPUTS_PER_SCALE": 128 if blocks else 1,
        "HAS_BIAS": True,
        "EXACT": out == "*fp32",
        "EVEN": even,
        "TILE_ROWS": tile.rows,
        "TILE_OUTPUTS": tile.outputs,
        "BLOCK": 128,
    }
    pointers = {"a_ptr": E4M3, "b_ptr": E4M3, "a_scale_ptr": "*fp32", "b_scale_ptr": "*fp32"}
    pointers |= {"bias_ptr": out, "out_ptr": out}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
    return compiled(_scaled_product, pointers, constants, target, **options)


def test_group_quantiser_reads_and_writes_16_bytes_at_a_time() -> None:
    ptx = quantiser("*bf16", E4M3, 16384, 7168, 128, HOPPER, ue8m0=True)
    assert ptx.count("ld.global.v4.b32") == 4 and ptx.count("st.global.v4.b32") == 2
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx and "div.rn.f32" in ptx and "div.full" not in ptx


def test_row_quantiser_reads_and_writes_16_bytes_at_a_time() -> None:
    ptx = quantiser("*fp16", E4M3, 16384, 7168, 7168, HOPPER, ue8m0=False)
    assert ptx.count("ld.global.v4.b32") == 4 and ptx.count("st.global.v4.b32") == 2


def test_int8_codes_are_rounded_after_the_product() -> None:
    """Fused, the two would round once."""
    ptx = quantiser("*bf16", INT8, 64, 7168, 128, HOPPER, ue8m0=False)
    assert "0f4B400000" in ptx and "fma" not in ptx


@pytest.mark.parametrize("codes", [E4M3, INT8])
def test_quantisers_compile_for_another_vendor(codes: str) -> None:
    assert "global_load_dwordx4" in quantiser("*bf16", codes, 16384, 4096, 128, MI300, ue8m0=True)


@pytest.mark.parametrize(("rows", "blocks"), [(64, True), (4096, True), (4096, False)])
def test_products_use_the_fp8_units_and_sum_blocks_in_float32(rows: int, blocks: bool) -> None:
    ptx = product(rows, 7168, "*bf16", HOPPER, blocks=blocks, even=True)
    assert ".f32.e4m3.e4m3" in ptx
    # The first step of each block starts from zero: its flag "add to what is there" is off.
    steps = [line.rpartition("}, ")[2].split(", ") for line in ptx.splitlines() if "wgmma.mma_async" in line]
    starts = [step[2] for step in steps]
    assert len(steps) == 4 and starts[0] == "0" and "0" not in starts[1:]


@pytest.mark.parametrize("rows", [1, 4096])
def test_float32_products_keep_off_the_fp8_units(rows: int) -> None:
    ptx = product(rows, 7168, "*fp32", HOPPER, blocks=True, even=False)
    assert ".f32.f16.f16" in ptx and ".e4m3.e4m3" not in ptx


def test_products_compile_for_another_vendor() -> None:
    assert "v_mfma" in product(4096, 7168, "*bf16", MI300, blocks=True, even=True)
