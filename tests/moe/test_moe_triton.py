"""Triton kernels with no GPU: their values in Triton's interpreter, their compilation for the devices they are for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.ops.contract import Signature
from lockstep.ops.grouped_gemm.tiles import default_tile, rows_of
from lockstep.ops.moe_topk_sigmoid.tiles import lanes_for as sigmoid_lanes
from lockstep.ops.moe_topk_softmax.tiles import lanes_for as softmax_lanes
from lockstep.ops.registry import kernels

pytestmark = pytest.mark.suite("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


OPERATORS = ("moe_topk_softmax", "moe_topk_sigmoid", "moe_align", "grouped_gemm", "fused_moe", "add_norm_route")
WAYS = ("fused_moe/pairs", "fused_moe/unrolled pairs", "fused_moe/tokens", "fused_moe/grouped")


def test_values_in_the_interpreter() -> None:
    """Which is chosen when Triton is imported: in a process of its own, one for all, since most of it is imports."""
    pytest.importorskip("triton")
    script = Path(__file__).parent / "interpreted.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, *OPERATORS, *WAYS], capture_output=True, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]


POINTERS = {
    "logits_ptr": "*bf16",
    "ids_ptr": "*i32",
    "weights_ptr": "*fp32",
    "bias_ptr": "*fp32",
    "out_ptr": "*bf16",
}
POINTERS |= {"x_ptr": "*bf16", "weight_ptr": "*bf16", "terms_ptr": "*bf16", "row_weights_ptr": "*fp32"}
POINTERS |= {name: "*i32" for name in ("counts_ptr", "pairs_ptr", "block_experts_ptr", "num_rows_ptr")}
POINTERS |= {"hidden_ptr": "*bf16", "inner_ptr": "*bf16"}
ROUTING = {"EXPERTS": 128, "TOP_K": 8, "RENORMALISE": True, "ID_MASK": 127, "DENSE": True, "FULL": True}
ROUTING |= {"CHUNK": 128, "ROWS": 8, "LANES": 4, "expert_stride": 1}
IN_GROUPS = {"GROUPS": 4, "TOP_GROUPS": 2, "PLACES": 32, "SMALLEST": 1e-20}
PROGRAMS: list[tuple[str, str, dict[str, Any]]] = [
    ("moe_topk_softmax", "_route", ROUTING | {"NARROW": True}),
    ("moe_topk_softmax", "_route", ROUTING | {"NARROW": False, "ROWS": 16, "LANES": 2}),
    ("moe_topk_softmax", "_route", ROUTING | {"NARROW": True, "RENORMALISE": False, "FULL": False}),
    ("moe_topk_sigmoid", "_route", ROUTING | IN_GROUPS),
    ("moe_topk_sigmoid", "_route", ROUTING | IN_GROUPS | {"EXPERTS": 60, "DENSE": False, "PLACES": 16}),
    ("moe_align", "_count", {"TOP_K": 8, "CHUNK": 1024, "choice_stride": 1}),
    (
        "moe_align",
        "_place",
        {"TOP_K": 8, "NUM_EXPERTS": 60, "EXPERTS_PADDED": 64, "BLOCK": 16, "CHUNK": 1024, "choice_stride": 1},
    ),
    ("fused_moe", "_sum_choices", {"TOP_K": 8, "BLOCK": 1024, "choice_stride": 1, "PDL": False}),
]
PAIRS = {"TOP_K": 8, "TILE_OUTPUTS": 8, "column_stride": 1, "choice_stride": 1, "PDL": False}
PROGRAMS += [
    (
        "fused_moe",
        name,
        PAIRS | {"INPUTS": inputs, "TILE_INPUTS": 256, "STAGES": stages, "hidden_column_stride": 1},
    )
    for name, inputs, stages in (
        ("_gate_and_up", 1024, 0),
        ("_gate_and_up", 1000, 3),
        ("_weighted_down", 768, 0),
        ("_weighted_down", 1000, 1),
    )
]
ALIGNED: dict[str, Any] = {"ids_ptr": None, "TOP_K": 0}
BY_TOKENS: dict[str, Any] = {
    "pairs_ptr": None,
    "block_experts_ptr": None,
    "num_rows_ptr": None,
    "TOP_K": 8,
}
TILES = [default_tile(rows, 2, 64 * 1024) for rows in (16, 64, 128)]
PROGRAMS += [
    (
        "grouped_gemm",
        "_grouped_product",
        {
            "TILE_ROWS": tile.rows,
            "TILE_OUTPUTS": tile.outputs,
            "TILE_INPUTS": tile.inputs,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            "EVEN": tile.rows > 16,
            "GATED": gated,
            "PAIRS_PER_ROW": 1 + gated,
            "x_input_stride": 1,
            "input_stride": 1,
            "PDL": False,
            **rows,
        },
    )
    for tile, gated, rows in (
        *((tile, gated, ALIGNED) for tile in TILES for gated in (False, True)),
        (TILES[0], True, BY_TOKENS),
        (TILES[1], False, BY_TOKENS),
    )
]


OF_PROGRAMS = pytest.mark.parametrize(
    ("op", "name", "constants"), PROGRAMS, ids=lambda value: value if isinstance(value, str) else ""
)


@OF_PROGRAMS
def test_programs_compile(op: str, name: str, constants: dict[str, Any]) -> None:
    compile_for(("cuda", 90, 32), op, name, constants)


@pytest.mark.suite("cpu", stage="nightly", seconds=20)
@OF_PROGRAMS
def test_programs_compile_for_another_vendor(op: str, name: str, constants: dict[str, Any]) -> None:
    compile_for(("hip", "gfx942", 64), op, name, constants)


def compile_for(target: tuple[str, Any, int], op: str, name: str, constants: dict[str, Any]) -> None:
    """What the interpreter lets pass, types of branches and layouts of products, a compiler does not."""
    triton = pytest.importorskip("triton")
    import importlib

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    program = getattr(importlib.import_module(f"lockstep.ops.{op}.programs"), name)
    free = {arg: POINTERS.get(arg, "fp32" if arg == "scale" else "i32") for arg in program.arg_names}
    signature = {arg: "constexpr" if arg in constants else kind for arg, kind in free.items()}
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    constants = {arg: value for arg, value in constants.items() if arg in free}
    compiled = triton.compile(
        ASTSource(program, signature=signature, constexprs=constants),
        target=GPUTarget(*target),
        options=options,
    )
    assert compiled.metadata.shared <= 64 * 1024, "more than every accelerator has"


def test_routers_too_large_for_lists_are_refused() -> None:
    refuses = next(kernel for kernel in kernels("moe_topk_sigmoid") if kernel.provider == "triton").refuses
    signature: Signature = {"experts": 256, "top_k": 8, "num_groups": 8, "top_k_groups": 4}
    assert refuses(signature) is None
    assert refuses({**signature, "top_k": 9}) == "keeps the best 8 experts, not 9"
    assert refuses({**signature, "experts": 5000}) == "reads 1024 experts, not 5000"
    assert refuses({**signature, "num_groups": 32}) is None
    assert refuses({**signature, "num_groups": 64}) == "compares 32 groups, not 64"


def test_a_lane_keeps_what_its_registers_hold() -> None:
    """Of every router that is not refused, whatever the number of tokens."""
    for lanes_for in (softmax_lanes, sigmoid_lanes):
        for experts in (1, 60, 128, 160, 256, 384, 512, 1024):
            lanes = [lanes_for(tokens, experts) for tokens in (1, 8192, 1 << 16, 1 << 20)]
            assert lanes == sorted(lanes, reverse=True) and set(lanes) <= {1, 2, 4, 8}
            assert experts <= 128 * lanes[-1]


def test_tiles_follow_the_share_of_an_expert() -> None:
    assert [rows_of(tokens * 8, 128) for tokens in (1, 64, 256, 512, 1024, 4096)] == [16, 16, 16, 32, 64, 128]
    for rows in (16, 32, 64, 128):
        for itemsize in (2, 4):
            for shared_bytes in (48 * 1024, 64 * 1024, 227 * 1024):
                tile = default_tile(rows, itemsize, shared_bytes)
                step_bytes = (rows + 2 * tile.outputs) * tile.inputs * itemsize
                assert tile.rows == rows and tile.num_stages >= 1 and tile.outputs >= 32
                assert tile.num_stages * step_bytes <= shared_bytes


def test_kernels_import_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from lockstep.ops.registry import kernels\n"
        f"for op in {OPERATORS}: assert any(kernel.provider == 'triton' for kernel in kernels(op))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_graph_could_hold_every_launch() -> None:
    """Sizes come from shapes alone: alignment of any routing has the same ones."""
    align = next(kernel for kernel in kernels("moe_align") if kernel.provider == "torch").function
    shapes = {
        tuple(tuple(each.shape) for each in align(ids.to(torch.int32), 16, 32))
        for ids in (torch.zeros(20, 2), torch.full((20, 2), -1), torch.arange(40).view(20, 2) % 16)
    }
    assert len(shapes) == 1
