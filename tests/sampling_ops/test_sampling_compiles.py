"""The Triton programs that choose tokens through Triton's compiler, which needs no GPU."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.suite("cpu", seconds=60)

triton = pytest.importorskip("triton")

HOPPER = ("cuda", 90, 32)
MI300 = ("hip", "gfx942", 64)
PROGRAMS = (
    ("argmax", "_best_of_tile"),
    ("argmax", "_best_of_tiles"),
    ("begin_rows", "_begin"),
    ("choose_greedy", "_keep_best"),
    ("copy_words", "_copy"),
    ("top_k_top_p_sample", "_weigh"),
    ("top_k_top_p_sample", "_gather"),
    ("top_k_top_p_sample", "_draw"),
)
READING = (("argmax", "_best_of_tile"), ("top_k_top_p_sample", "_weigh"), ("top_k_top_p_sample", "_gather"))
POINTERS = {
    "logits_ptr": "*fp32",
    "values_ptr": "*fp32",
    "temperature_ptr": "*fp32",
    "top_p_ptr": "*fp32",
    "min_p_ptr": "*fp32",
    "draw_ptr": "*fp64",
    "counts_ptr": "*i32",
    "packed_ptr": "*i32",
    "source_ptr": "*i32",
    "target_ptr": "*i32",
    "table_ptr": "*bf16",
    "hidden_ptr": "*bf16",
    "cos_sin_ptr": "*fp32",
    "angles_ptr": "*fp32",
    "num_candidates_ptr": "*i32",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(op: str, program: str, target: Any, *, one_tile: bool = False, dtype: str = "*fp32") -> str:
    """The assembly for a target. A launch makes a constant of every number that is 1."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"lockstep.ops.{op}.programs"), program)
    sizes = {
        "BLOCK": 8192,
        "TILES": 1 if one_tile else 32,
        "CHUNK": 1024,
        "PDL": target[0] == "cuda",
        "WIDTH": 8000,
        "PAIRS": 64,
        "PAIR_BLOCK": 64,
        "HAS_SOURCES": not one_tile,
        **({"num_tiles": 1} if one_tile else {}),
    }
    names = function.arg_names
    constants = {name: value for name, value in sizes.items() if name in names}
    kinds = {name: "*i64" if name.endswith("_ptr") else "i32" for name in names} | POINTERS
    kinds = {name: kinds[name] for name in names} | dict.fromkeys(constants, "constexpr")
    kinds |= {"logits_ptr": dtype} if "logits_ptr" in names else {}
    aligned = [
        at for at, name in enumerate(names) if name.endswith("_ptr") or name in ("row_stride", "vocab_size")
    ]
    attributes = {(at,): [["tt.divisibility", 16]] for at in aligned}
    source = ASTSource(function, kinds, constexprs=constants, attrs=attributes)
    assembly = triton.compile(source, target=GPUTarget(*target), options={"num_warps": 8}).asm
    return str(assembly["ptx" if target[0] == "cuda" else "amdgcn"])


@pytest.mark.parametrize(("op", "program"), PROGRAMS)
def test_compiles_for_two_vendors_and_for_a_single_tile(op: str, program: str) -> None:
    assert ".visible .entry" in compiled(op, program, HOPPER, one_tile=True)
    assert ".visible .entry" in compiled(op, program, HOPPER)
    assert "s_endpgm" in compiled(op, program, MI300)


@pytest.mark.parametrize(("op", "program"), READING)
@pytest.mark.parametrize("dtype", ["*fp32", "*bf16"])
def test_logits_are_read_16_bytes_at_a_time(op: str, program: str, dtype: str) -> None:
    ptx = compiled(op, program, HOPPER, dtype=dtype)
    reads = 8192 // 256 * (4 if dtype == "*fp32" else 2) // 16
    assert ptx.count("ld.global.v4.b32") >= reads
