"""Triton kernels with no GPU: their values in Triton's interpreter, their compilation for the devices they are for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.ops.contract import Signature
from lockstep.ops.grouped_gemm import tiles
from lockstep.ops.grouped_gemm.tiles import DeviceFacts, Measured, Problem, Tile, default_tile, rows_of, tile_of
from lockstep.ops.registry import kernels

pytestmark = pytest.mark.suite("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


OPERATORS = ("moe_topk_softmax", "moe_topk_sigmoid", "moe_align", "grouped_gemm", "fused_moe")


@pytest.mark.parametrize("op", OPERATORS)
def test_values_in_the_interpreter(op: str) -> None:
    pytest.importorskip("triton")
    script = Path(__file__).parent / "interpreted.py"
    done = subprocess.run([sys.executable, "-W", "ignore", script, op], capture_output=True, text=True)
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
ROUTING = {"EXPERTS": 128, "TOP_K": 8, "ROWS": 32, "LANES": 4, "RENORMALISE": True, "expert_stride": 1}
PROGRAMS: list[tuple[str, str, dict[str, Any]]] = [
    ("moe_topk_softmax", "_route", ROUTING | {"NARROW": True, "FOURS": 8}),
    ("moe_topk_softmax", "_route", ROUTING | {"NARROW": True, "FOURS": 8, "RENORMALISE": False}),
    ("moe_topk_sigmoid", "_route", ROUTING | {"GROUPS": 4, "TOP_GROUPS": 2, "SMALLEST": 1e-20, "FOURS": 2}),
    ("moe_align", "_count", {"TOP_K": 8, "CHUNK": 1024, "choice_stride": 1}),
    (
        "moe_align",
        "_place",
        {"TOP_K": 8, "NUM_EXPERTS": 60, "EXPERTS_PADDED": 64, "BLOCK": 16, "CHUNK": 1024, "choice_stride": 1},
    ),
    ("fused_moe", "_sum_choices", {"TOP_K": 8, "BLOCK": 1024, "choice_stride": 1}),
]
TILES = [default_tile(rows, 2, 64 * 1024) for rows in (16, 64, 128)]
PROGRAMS += [
    (
        "grouped_gemm",
        "_grouped_product",
        {
            "TILE_ROWS": tile.rows,
            "TILE_OUTPUTS": tile.outputs,
            "TILE_INPUTS": tile.inputs,
            "EVEN": tile.rows > 16,
            "GATED": gated,
            "PAIRS_PER_ROW": 1 + gated,
            "x_input_stride": 1,
            "input_stride": 1,
        },
    )
    for tile in TILES
    for gated in (False, True)
]


@pytest.mark.parametrize("target", [("cuda", 90, 32), ("hip", "gfx942", 64)], ids=lambda target: target[0])
@pytest.mark.parametrize(
    ("op", "name", "constants"), PROGRAMS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_programs_compile(op: str, name: str, constants: dict[str, Any], target: tuple[str, Any, int]) -> None:
    """What the interpreter lets pass, types of branches and layouts of products, a compiler does not."""
    triton = pytest.importorskip("triton")
    import importlib

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    program = getattr(importlib.import_module(f"lockstep.ops.{op}.programs"), name)
    free = {arg: POINTERS.get(arg, "fp32" if arg == "scale" else "i32") for arg in program.arg_names}
    signature = {arg: "constexpr" if arg in constants else kind for arg, kind in free.items()}
    compiled = triton.compile(
        ASTSource(program, signature=signature, constexprs=constants), target=GPUTarget(*target)
    )
    assert compiled.metadata.shared <= 64 * 1024, "more than every accelerator has"


def test_routers_too_large_for_lists_are_refused() -> None:
    refuses = next(kernel for kernel in kernels("moe_topk_sigmoid") if kernel.provider == "triton").refuses
    signature: Signature = {"experts": 256, "top_k": 8, "num_groups": 8, "top_k_groups": 4}
    assert refuses(signature) is None
    assert refuses({**signature, "top_k": 9}) == "keeps the best 8 experts, not 9"
    assert refuses({**signature, "experts": 5000}) == "tells 4096 experts apart, not 5000"
    assert refuses({**signature, "num_groups": 32}) is None
    assert refuses({**signature, "num_groups": 32, "top_k_groups": 17}) == "keeps the best 16 groups, not 17"


def test_tiles_follow_the_share_of_an_expert() -> None:
    assert [rows_of(tokens * 8, 128) for tokens in (1, 64, 256, 512, 1024, 4096)] == [16, 16, 16, 32, 64, 128]
    for rows in (16, 32, 64, 128):
        for itemsize in (2, 4):
            for shared_bytes in (48 * 1024, 64 * 1024, 227 * 1024):
                tile = default_tile(rows, itemsize, shared_bytes)
                step_bytes = (rows + 2 * tile.outputs) * tile.inputs * itemsize
                assert tile.rows == rows and tile.num_stages >= 1 and tile.outputs >= 32
                assert tile.num_stages * step_bytes <= shared_bytes


def test_measured_tiles_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(num_pairs=64, num_experts=128, inputs=2048, outputs=1536, itemsize=2)
    best = Tile(16, 64, 256, 8, 2)
    (tmp_path / "a_fast_card_80gb.json").write_text(
        '[{"problem": {"num_pairs": 64, "num_experts": 128, "inputs": 2048, "outputs": 1536, "itemsize": 2},'
        ' "tile": {"rows": 16, "outputs": 64, "inputs": 256, "num_warps": 8, "num_stages": 2}}]'
    )
    monkeypatch.setattr(tiles, "_TUNED", tmp_path)
    device = DeviceFacts("A Fast-Card 80GB", 200_000)
    assert tiles.tuned_tiles(device.name) == (Measured(problem, best),)
    assert tile_of(problem, device) == tile_of(problem._replace(num_pairs=8), device) == best
    for other in (problem._replace(num_pairs=65), problem._replace(inputs=1024)):
        assert tile_of(other, device) == default_tile(16, 2, 200_000)
    assert tile_of(problem, DeviceFacts("another", 200_000)) != best


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
