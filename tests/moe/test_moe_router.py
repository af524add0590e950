"""Routers over one kernel: who gets it, that nothing else changes, and what its program does when."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from test_decode_compiles import READ_16_BYTES, RELEASE, WAIT, compiled
from tiny_models import LAYOUTS, SeededWeights, TinyModel, build_over

from lockstep.core.capabilities import Capabilities
from lockstep.core.errors import KernelError
from lockstep.core.probe import ProbePoint
from lockstep.layers.build import Build
from lockstep.layers.norm import NormSpec
from lockstep.layers.router import SoftmaxRouter
from lockstep.models.loading.sources import ShapeWeights
from lockstep.ops import selection
from lockstep.ops.add_norm_route.reference import add_norm_route
from lockstep.ops.add_norm_route.tiles import MOST_ROWS, Tile, tile_of
from lockstep.ops.contract import Kernel
from lockstep.ops.moe_topk_softmax.reference import moe_topk_softmax
from lockstep.ops.registry import kernels
from lockstep.ops.selection import KernelSelector
from lockstep.parallel.mesh import Mesh, ShapeGroup
from lockstep.parallel.placement import Partial

pytestmark = pytest.mark.suite("cpu")

OP = "add_norm_route"
PARTS = {"linear", "moe_topk_softmax"}
MIXTURE = next(layout.config for layout in LAYOUTS if "experts" in layout.name)
HOPPER = Capabilities(
    platform="cuda", device_type="cuda", device_name="a test", features=frozenset({"triton"}), has_triton=True
)


@pytest.fixture
def fused_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operator has a kernel "together" on any platform, for those who name it: its reference."""
    together = Kernel(OP, "together", add_norm_route, by_name=True)
    monkeypatch.setattr(selection, "kernels", lambda op: (*kernels(op), *([together] if op == OP else [])))
    yield


def build_with(*preference: str, mesh: Mesh | None = None, **options: Any) -> Build:
    build = build_over(mesh or Mesh.solo(), SeededWeights())
    own = build.kernels
    build.kernels = KernelSelector(own._capabilities, (*preference, *own._preference), **options)
    return build


def ops_of_routers(build: Build) -> set[str]:
    return {binding.op for binding in build.kernels.bindings if binding.where.endswith(".mlp.gate")}


def test_a_model_answers_as_it_does_in_parts(fused_here: None) -> None:
    in_parts, together = (TinyModel(build, MIXTURE) for build in (build_with(), build_with("together")))
    assert ops_of_routers(together.build) == {OP} and ops_of_routers(in_parts.build) == PARTS
    torch.testing.assert_close(together.logits(), in_parts.logits(), rtol=0, atol=1e-5)
    assert together.build.weight_bytes == in_parts.build.weight_bytes


def on_hopper(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Build:
    build = build_over(Mesh.solo(), ShapeWeights(), meta=True, dtype=dtype)
    build.kernels = KernelSelector(HOPPER, ("triton", "torch", "reference"), **options)
    TinyModel(build, MIXTURE)
    return build


def routed_by(build: Build) -> dict[str, Kernel]:
    return {
        binding.op: binding.kernel for binding in build.kernels.bindings if binding.where.endswith(".mlp.gate")
    }


def test_a_gpu_gets_one_kernel_unless_it_refuses_or_a_part_is_forced() -> None:
    assert {op: kernel.provider for op, kernel in routed_by(on_hopper()).items()} == {OP: "triton"}
    refused = on_hopper(torch.float32)
    (site,) = {binding.refused for binding in refused.kernels.bindings if binding.op == OP}
    assert dict(site) == {"triton": "chooses by logits of bfloat16 and float16, not torch.float32"}
    for build in (refused, *(on_hopper(forced={op: "torch"}) for op in PARTS)):
        assert routed_by(build)[OP].provider == "parts" and routed_by(build).keys() == {OP, *PARTS}
    with pytest.raises(KernelError, match=rf"{OP}=triton cannot serve .* linear=torch asks for the parts"):
        on_hopper(forced={OP: "triton", "linear": "torch"})


def test_routers_that_its_program_does_not_do_well_are_refused() -> None:
    refuses = next(kernel for kernel in kernels(OP) if kernel.provider == "triton").refuses
    fits = {"dtype": torch.bfloat16, "inputs": 2048, "experts": 128, "top_k": 8}
    assert refuses(fits) is None
    assert refuses({**fits, "experts": 512}) == "chooses among 256 experts, not 512"
    assert refuses({**fits, "top_k": 10}) == "keeps the best 8 experts, not 10"
    assert refuses({**fits, "inputs": 100_000}) == "holds a row in registers: up to 65536 wide, not 100000"


class Watching:
    """A probe that wants one point."""

    def __init__(self, point: str) -> None:
        self.point = point
        self.seen: list[torch.Tensor] = []

    def wants(self, point: ProbePoint) -> bool:
        return point.name == self.point

    def record(self, point: ProbePoint, value: torch.Tensor) -> None:
        self.seen.append(value)

    def begin_step(self, step_id: int, rows: tuple[tuple[int, int], ...]) -> None:
        """Rows are told apart by their order."""


LAYER = "model.layers.1"


@pytest.mark.parametrize(
    ("point", "op"),
    [("mlp.gate", "linear"), ("post_attention_layernorm", "linear"), ("mlp", OP), ("self_attn", OP)],
)
def test_what_lies_between_is_computed_for_whoever_watches_it(point: str, op: str, fused_here: None) -> None:
    build = build_with("together")
    build.probe = watching = Watching(f"{LAYER}.{point}")
    model = TinyModel(build, MIXTURE)
    bound = {binding.op for binding in build.kernels.bindings if binding.where == f"{LAYER}.mlp.gate"}
    assert op in bound and (op == OP) == (OP in bound)
    model.logits()
    assert watching.seen


class OtherRank(ShapeGroup):
    """A second rank whose term is always the same."""

    def __init__(self, term: torch.Tensor) -> None:
        super().__init__(0, 2)
        self.term = term

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + self.term


def test_the_terms_of_all_ranks_are_summed_before_the_choice(fused_here: None) -> None:
    mine, other, residual = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
    build = build_with("together", mesh=Mesh({"tp": OtherRank(other), "ep": ShapeGroup(0, 1)}))
    router = SoftmaxRouter(build, "gate", NormSpec("norm", 6, 1e-5), num_experts=5, top_k=2, renormalise=True)
    routed = router(Partial(mine.clone(), "tp"), residual.clone())
    assert [binding.op for binding in build.kernels.bindings] == [OP]
    weights = SeededWeights()
    gate, norm = (
        weights.load(f"{name}.weight", shape, torch.float32, None).double()
        for name, shape in (("gate", (5, 6)), ("norm", (6,)))
    )
    total = residual.double() + mine.double() + other.double()
    normed = torch.nn.functional.rms_norm(total, (6,), norm, 1e-5)
    shares, ids = moe_topk_softmax(normed @ gate.T, 2, True)
    torch.testing.assert_close(routed.residual_TD.double(), total, rtol=0, atol=1e-6)
    torch.testing.assert_close(routed.hidden_TD.double(), normed, rtol=0, atol=1e-5)
    torch.testing.assert_close(routed.weights_TK, shares, rtol=1e-5, atol=0)
    assert torch.equal(routed.ids_TK, ids)


def test_tiles_hold_all_rows_and_parts_cover_all_inputs() -> None:
    assert tile_of(0, 2048) is None and tile_of(MOST_ROWS + 1, 2048) is None
    for rows in range(1, MOST_ROWS + 1):
        for inputs in (16, 100, 2048, 4096, 7168, 16384):
            tile = cast(Tile, tile_of(rows, inputs))
            assert rows <= tile.rows < max(2 * rows, 9)
            assert 64 <= tile.inputs <= 512 and tile.inputs & (tile.inputs - 1) == 0


def program(tile: Tile, *, early: bool) -> str:
    """PTX for Qwen3 30B-A3B."""
    kinds = {"eps": "fp32", "partial_ptr": "*fp32", "weights_ptr": "*fp32"}
    kinds |= dict.fromkeys(("counter_ptr", "ids_ptr"), "*i32")
    constants = {"INPUTS": 2048, "EXPERTS": 128, "TOP_K": 8, "RENORMALISE": True, "ID_MASK": 127, "PLACES": 128}
    constants |= {"ROWS": tile.rows, "TILE_EXPERTS": tile.experts, "TILE_INPUTS": tile.inputs}
    constants |= {"PARTS": 2048 // tile.inputs, "PDL": early}
    return compiled(f"{OP}.programs", "_normalise_and_route", kinds, constants, tile.num_warps, 2)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("tile", [tile_of(8, 2048), tile_of(16, 2048), Tile(32, 32, 256, 8)], ids=str)
def test_the_weight_is_early_and_the_choice_waits_for_all(tile: Tile, own_cache: None) -> None:
    ptx = program(tile, early=True)
    before, wait, after = ptx.partition(WAIT)
    assert wait and RELEASE in after and RELEASE not in before
    assert re.search(READ_16_BYTES, before) and "st.global" not in before and "atom" not in before
    counted = re.search(r"atom\.global\.gpu\.acq_rel\.add", after)
    assert counted is not None
    written = after.rindex("st.global", 0, counted.start())
    assert "bar.sync" in after[written : counted.start()]
    chosen = after[counted.end() :]
    assert "ld.global.cg" in chosen and len(re.findall(r"redux\.sync\.max", chosen)) >= 8
    # One barrier tells all threads that they are last; rows lie in warps, so that no choice waits for another warp.
    assert chosen.count("bar.sync") == 1
    late = program(tile, early=False)
    assert WAIT not in late and RELEASE not in late
