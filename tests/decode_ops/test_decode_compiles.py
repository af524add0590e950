"""The Triton programs of a decode step through Triton's compiler, which needs no GPU: what is early, and what waits."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from lockstep.ops.add_norm_linear.tiles import Problem
from lockstep.ops.add_norm_linear.tiles import tile_of as normed_tile
from lockstep.ops.linear.tiles import Block, GatedBlock, Tile, default_tile, tile_of

pytestmark = pytest.mark.suite("cpu", seconds=20)

triton = pytest.importorskip("triton")

WAIT, RELEASE = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
READ_16_BYTES = r"ld\.global[\w.:]*\.v4\.b32"
FETCH_AHEAD = r"cp\.async\.bulk\.prefetch\.L2"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(
    room: str, program: str, kinds: dict[str, str], constants: dict[str, Any], num_warps: int, num_stages: int
) -> str:
    """PTX for Hopper. Pointers are in bfloat16 unless `kinds` says else; sizes but the rows are multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"lockstep.ops.{room}"), program)
    names = function.arg_names
    kinds = {name: "*bf16" if name.endswith("_ptr") else "i32" for name in names} | kinds
    kinds |= dict.fromkeys(constants, "constexpr")
    aligned = [
        at for at, name in enumerate(names) if kinds[name].startswith(("*", "i32")) and name != "num_rows"
    ]
    attributes = {(at,): [["tt.divisibility", 16]] for at in aligned}
    source = ASTSource(function, kinds, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])


def sizes(tile: Tile) -> dict[str, Any]:
    return {"ROWS": tile.rows, "TILE_OUTPUTS": tile.outputs, "TILE_INPUTS": tile.inputs, "EVEN": True}


def product(rows: int, outputs: int, inputs: int, *, early: bool) -> str:
    tile = tile_of(rows, outputs, inputs)
    assert isinstance(tile, Tile)
    constants = sizes(tile) | {"bias_ptr": None, "SPLITS": tile.splits, "PDL": early}
    kinds = {"partial_ptr": "*fp32", "counters_ptr": "*i32"}
    if tile.splits == 1:
        constants |= dict.fromkeys(kinds)
    return compiled("linear.programs", "_product", kinds, constants, tile.num_warps, tile.num_stages)


def normed(rows: int, outputs: int, inputs: int, *, gated: bool, early: bool) -> str:
    # Also for rows that single operators are quicker for: the program must do what it says.
    own = default_tile(rows, outputs // 2 if gated else outputs, inputs)._replace(splits=1)
    tile = normed_tile(Problem(rows, outputs, inputs, gated)) or own
    assert isinstance(tile, Tile)
    constants = sizes(tile) | {"bias_ptr": None, "GATED": gated, "PDL": early}
    return compiled(
        "add_norm_linear.programs",
        "_normed_product",
        {"eps": "fp32"},
        constants,
        tile.num_warps,
        tile.num_stages,
    )


def in_blocks(block: Block, *, gated: bool = False, early: bool = True) -> str:
    constants: dict[str, Any] = {"bias_ptr": None, "GATED": gated, "PDL": early}
    constants |= {"ROWS": block.rows, "TILE_OUTPUTS": block.outputs, "TILE_INPUTS": block.inputs}
    constants |= {"SPLITS": block.splits, "AHEAD": block.ahead}
    kinds = {"partial_ptr": "*fp32", "counters_ptr": "*i32"}
    if block.splits == 1:
        constants |= dict.fromkeys(kinds)
    kinds["x"] = f"tensordesc<bf16[{block.rows}, {block.inputs}]>"
    kinds["weight"] = f"tensordesc<bf16[{block.outputs}, {block.inputs}]>"
    return compiled("linear.blocks", "_block_product", kinds, constants, block.num_warps, block.num_stages)


def in_gated_blocks(block: GatedBlock) -> str:
    constants: dict[str, Any] = {"bias_ptr": None, "GROUP": block.group, "PDL": True}
    constants |= {"ROWS": block.rows, "TILE_OUTPUTS": block.outputs, "TILE_INPUTS": block.inputs}
    kinds = {
        "x": f"tensordesc<bf16[{block.rows}, {block.inputs}]>",
        "weight": f"tensordesc<bf16[2, {block.outputs}, {block.inputs}]>",
        "out": f"tensordesc<bf16[{block.rows}, {block.outputs}]>",
    }
    return compiled("linear.gated_blocks", "_gated_blocks", kinds, constants, block.num_warps, block.num_stages)


def heads(*, early: bool) -> str:
    constants = dict.fromkeys(
        ("element_stride", "slots_stride", "k_pool_element_stride", "v_pool_element_stride"), 1
    )
    constants |= {"PAGE_SIZE": 16, "HAS_NORMS": True, "HALF": 64, "HEADS": 4, "BLOCK": 64, "PDL": early}
    kinds = {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "slots_ptr": "*i64", "eps": "fp32"}
    return compiled("norm_rope_store.programs", "_store_heads", kinds, constants, 1, 3)


def programs(*, early: bool) -> dict[str, str]:
    """The shapes of Qwen3 0.6B and 8B."""
    return {
        "one row": product(1, 1024, 3072, early=early),
        "rows": product(8, 4096, 4096, early=early),
        "rows in parts": product(16, 1024, 2048, early=early),
        "normed row": normed(1, 4096, 1024, gated=False, early=early),
        "normed and gated row": normed(1, 2 * 3072, 1024, gated=True, early=early),
        "normed and gated rows": normed(8, 2 * 12288, 4096, gated=True, early=early),
        "blocks": in_blocks(Block(128, 64, 64, 1, 1024, 4, 4), early=early),
        "blocks in parts": in_blocks(Block(64, 64, 128, 4, 512, 4, 4), early=early),
        "gated blocks": in_blocks(Block(64, 64, 64, 1, 1024, 4, 4), gated=True, early=early),
        "heads": heads(early=early),
    }


def test_weights_are_on_their_way_before_the_wait_and_nothing_is_written() -> None:
    for name, ptx in programs(early=True).items():
        before, wait, after = ptx.partition(WAIT)
        # A small kernel lets the next one start beside it.
        releasing, holding = (before, after) if name == "heads" else (after, before)
        assert wait and RELEASE in releasing and RELEASE not in holding, name
        assert re.search(FETCH_AHEAD if "blocks" in name else READ_16_BYTES, before) or name == "heads", name
        assert "st.global" not in before and "atom" not in before, name
        assert "st.global" in after, name


def test_launched_as_ever_nothing_waits() -> None:
    for name, ptx in programs(early=False).items():
        assert WAIT not in ptx and RELEASE not in ptx, name


def test_weights_are_read_16_bytes_at_a_time() -> None:
    for name, ptx in programs(early=False).items():
        if name != "heads" and "blocks" not in name:
            copied = re.findall(r"cp\.async\.cg\.shared\.global[^;]*0x10", ptx)
            assert len(re.findall(READ_16_BYTES, ptx)) + len(copied) >= 4, name


def test_blocks_are_copied_by_the_engine_and_multiplied_by_whole_groups_of_warps() -> None:
    """Four warps multiply 64 outputs by all rows at once; nothing goes through the registers of a thread."""
    for rows, num_warps, width in ((64, 4, 64), (128, 4, 128), (256, 8, 128)):
        ptx = in_blocks(Block(rows, 64, 64, 1, 1024, num_warps, 4))
        assert f"wgmma.mma_async.sync.aligned.m64n{width}k16.f32.bf16.bf16" in ptx
        assert "cp.async.bulk.tensor.2d" in ptx and not re.search(r"cp\.async\.c[ag]|ld\.global", ptx)


def test_parts_are_counted_by_one_release_and_read_past_the_nearest_cache() -> None:
    """A program that came last must see what the others wrote."""
    for ptx in (product(16, 1024, 2048, early=True), in_blocks(Block(64, 64, 128, 4, 512, 4, 4))):
        counted = re.search(r"atom\.global\.gpu\.acq_rel\.add", ptx)
        assert counted is not None
        written = ptx.rindex("st.global", 0, counted.start())
        assert "bar.sync" in ptx[written : counted.start()]
        assert "ld.global.cg" in ptx[counted.end() :]


def test_gates_and_ups_come_in_one_copy_and_are_one_product_that_never_leaves_registers() -> None:
    for rows, outputs, num_warps, width in ((128, 128, 8, 256), (256, 64, 8, 128), (64, 64, 4, 128)):
        ptx = in_gated_blocks(GatedBlock(rows, outputs, 64, 8, 1, num_warps, 3))
        assert set(re.findall(r"wgmma\.mma_async\S*\.(m\d+n\d+)k16", ptx)) == {f"m64n{width}"}
        # The next product is issued before this one has ended.
        assert "wgmma.wait_group.sync.aligned 1" in ptx
        before, wait, after = ptx.partition(WAIT)
        assert wait and RELEASE in after and "cp.async.bulk.tensor" not in before
        assert re.search(r"cp\.async\.bulk\.tensor\.3d\.shared::\w+\.global", after)
        assert "cp.async.bulk.tensor.2d.global.shared" in after
        assert not re.search(r"(ld|st)\.global|ld\.shared", ptx)
