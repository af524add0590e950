"""Layers over fused kernels: who gets them, that nothing else changes, and that sums are still owed as a type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_models import LAYOUTS, Layout, SeededWeights, TinyModel, build_over

from lockstep.attention.backend import AttentionSpec
from lockstep.core.capabilities import Capabilities
from lockstep.core.errors import KernelError, PlacementError
from lockstep.core.probe import ProbePoint
from lockstep.kv.pool.pool import KVShape
from lockstep.layers import norm
from lockstep.layers.build import Build
from lockstep.layers.linear import Part
from lockstep.layers.norm import NormSpec
from lockstep.layers.normed_linear import NormedLinear
from lockstep.models.loading.sources import ShapeWeights
from lockstep.ops import selection
from lockstep.ops.add_norm_linear.reference import add_norm_linear
from lockstep.ops.begin_rows.reference import begin_rows
from lockstep.ops.contract import Kernel
from lockstep.ops.norm_rope_store.reference import norm_rope_store
from lockstep.ops.registry import contracts, kernels
from lockstep.ops.selection import KernelSelector
from lockstep.parallel.mesh import Mesh, ShapeGroup
from lockstep.parallel.placement import Partial, Sharded

pytestmark = pytest.mark.suite("cpu")

FUSED: dict[str, Callable[..., Any]] = {
    "norm_rope_store": norm_rope_store,
    "add_norm_linear": add_norm_linear,
    "begin_rows": begin_rows,
}
HOPPER = Capabilities(
    platform="cuda", device_type="cuda", device_name="a test", features=frozenset({"triton"}), has_triton=True
)
PREFERENCE = ("triton", "torch", "reference")


@pytest.fixture
def fused_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every fused operator has a kernel "together" on any platform, for those who name it: its reference."""

    def offered(op: str) -> tuple[Kernel, ...]:
        own = (Kernel(op, "together", FUSED[op], by_name=True),) if op in FUSED else ()
        return (*kernels(op), *own)

    monkeypatch.setattr(selection, "kernels", offered)
    yield


def with_preference(build: Build, *first: str) -> Build:
    own = build.kernels
    build.kernels = KernelSelector(own._capabilities, (*first, *own._preference))
    return build


def bound(build: Build) -> set[tuple[str, str]]:
    return {(binding.op, binding.kernel.provider) for binding in build.kernels.bindings}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_models_answer_as_they_do_in_parts(layout: Layout, fused_here: None) -> None:
    in_parts = TinyModel(build_over(Mesh.solo(), SeededWeights()), layout.config)
    together = TinyModel(with_preference(build_over(Mesh.solo(), SeededWeights()), "together"), layout.config)
    torch.testing.assert_close(together.logits(), in_parts.logits(), rtol=0, atol=1e-5)
    ops = {op for op, provider in bound(together.build) if provider == "together"}
    # Gemma scales what it looks up.
    wanted = FUSED.keys() - ({"begin_rows"} if layout.name.startswith("gemma3") else set())
    assert wanted <= ops and not {"rope", "kv_store"} & {op for op, _ in bound(together.build)}
    assert not FUSED.keys() & {op for op, _ in bound(in_parts.build)}
    assert together.build.weight_bytes == in_parts.build.weight_bytes


def on_hopper(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Build:
    build = build_over(Mesh.solo(), ShapeWeights(), meta=True, dtype=dtype)
    build.kernels = KernelSelector(HOPPER, PREFERENCE, **options)
    TinyModel(build, LAYOUTS[4].config)
    return build


def test_a_gpu_gets_one_kernel_for_many() -> None:
    found = bound(on_hopper())
    assert {(op, "triton") for op in (*FUSED, "linear", "add_rms_norm")} <= found
    # The last norm alone is followed by no product.
    assert not {"rope", "kv_store", "rms_norm", "silu_and_mul"} & {op for op, _ in found}


def test_what_refuses_is_bound_in_parts_and_says_why() -> None:
    build = on_hopper(torch.float16)
    found = [binding for binding in build.kernels.bindings if binding.op == "add_norm_linear"]
    assert {binding.kernel.provider for binding in found} == {"parts"}
    refused = dict(found[0].refused)
    assert refused.pop("cuda") == "the device lacks cuda_bindings, sm_90"
    assert refused == {"triton": "multiplies bfloat16, not torch.float16"}
    assert not any(binding.kernel.asks_host for binding in found)
    assert {("add_rms_norm", "triton"), ("rms_norm", "triton"), ("silu_and_mul", "triton")} <= bound(build)


def test_whoever_forces_a_part_gets_the_parts() -> None:
    for forced in ({"rope": "torch"}, {"norm_rope_store": "reference"}, {"*": "reference"}):
        build = on_hopper(forced=forced)
        assert ("norm_rope_store", "parts") in bound(build)
        assert {op for op, _ in bound(build)} >= {"rope", "kv_store", "rms_norm"}
    with pytest.raises(
        KernelError, match=r"norm_rope_store=triton cannot serve .* rope=torch asks for the parts"
    ):
        on_hopper(forced={"norm_rope_store": "triton", "rope": "torch"})
    build = on_hopper(forced={"norm_rope_store": "triton", "linear": "torch"})
    assert {("norm_rope_store", "triton"), ("linear", "torch")} <= bound(build)
    with pytest.raises(KernelError, match="--force-kernel add_norm_linear=triton cannot serve"):
        on_hopper(torch.float16, forced={"add_norm_linear": "triton"})


def test_the_parts_of_a_contract_are_operators() -> None:
    named = {part for contract in contracts().values() for part in contract.parts}
    assert named and named <= set(contracts())


def test_what_is_watched_has_a_kernel_of_its_own(fused_here: None) -> None:
    class Watching:
        def wants(self, point: ProbePoint) -> bool:
            return point.name.endswith(("0.input_layernorm", "1.self_attn.k_norm", "embed_tokens"))

        def record(self, point: ProbePoint, value: Any) -> None:
            """Nothing is computed here."""

        def begin_step(self, step_id: int, rows: tuple[tuple[int, int], ...]) -> None:
            """Nothing is computed here."""

    build = with_preference(build_over(Mesh.solo(), SeededWeights()), "together")
    build.probe = Watching()
    TinyModel(build, LAYOUTS[4].config)
    ops = [(binding.op, binding.where) for binding in build.kernels.bindings]
    assert ("rms_norm", "model.layers.0.input_layernorm") in ops
    assert ("rms_norm", "model.layers.1.self_attn.k_norm") in ops
    assert ("norm_rope_store", "model.layers.0.self_attn") in ops
    assert ("norm_rope_store", "model.layers.1.self_attn") not in ops
    assert ("begin_rows", "parts") in bound(build)
    assert build.fresh_signature is None, "one layer's heads take several kernels"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_what_a_kernel_of_fresh_heads_would_read(layout: Layout, fused_here: None) -> None:
    build = with_preference(
        build_over(Mesh.solo(), ShapeWeights(), meta=True, dtype=torch.bfloat16), "together"
    )
    build.kv_dtype = torch.float16
    TinyModel(build, layout.config)
    has_norms = layout.name.startswith(("qwen3", "gemma3"))
    weight_dtype = torch.float32 if layout.name.startswith("gemma3") else torch.bfloat16
    assert build.fresh_signature == {
        "dtype": torch.bfloat16,
        "pool_dtype": torch.float16,
        "weight_dtype": weight_dtype if has_norms else None,
        "heads": layout.num_heads,
        "kv_heads": layout.num_kv_heads,
        "head_dim": 8,
        "page_size": build.page_size,
        "window": layout.settings.get("sliding_window", 0),
        "soft_cap": 0.0,
        "sinks": False,
    }
    assert set(build.fresh_signature) == set(contracts()["norm_rope_attention_decode"].signature)


def test_heads_in_parts_or_of_several_kinds_are_no_fresh_ones(fused_here: None) -> None:
    assert on_hopper().fresh_signature is not None
    assert on_hopper(forced={"rope": "torch"}).fresh_signature is None
    assert build_over(Mesh.solo(), ShapeWeights(), meta=True).fresh_signature is None
    build = build_over(Mesh.solo(), ShapeWeights(), meta=True)
    new_heads = {"dtype": torch.bfloat16, "weight_dtype": None}
    for num_heads, is_alike in ((4, True), (4, True), (6, False)):
        build.add_attention(KVShape(2, 8), num_heads, AttentionSpec(1.0), new_heads)
        assert (build.fresh_signature is not None) is is_alike


class OtherRank(ShapeGroup):
    """A second rank whose term is always the same."""

    def __init__(self, term: torch.Tensor) -> None:
        super().__init__(0, 2)
        self.term = term

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + self.term


def normed_linear(term: torch.Tensor) -> tuple[NormedLinear, Build]:
    mesh = Mesh({"tp": OtherRank(term), "ep": ShapeGroup(0, 1)})
    build = with_preference(build_over(mesh, SeededWeights()), "together")
    spec = NormSpec("norm", term.shape[1], 1e-5)
    return NormedLinear(build, "up", spec, (Part("up", 10, 0, 5),)), build


def test_the_terms_of_all_ranks_are_summed_before_the_norm(fused_here: None) -> None:
    mine, other, residual = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
    layer, build = normed_linear(other)
    out, total = layer(Partial(mine.clone(), "tp"), residual.clone())
    assert bound(build) == {("add_norm_linear", "together")}
    expected = residual.double() + mine.double() + other.double()
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=1e-6)
    weights = SeededWeights()
    weight_OD = weights.load("up.weight", (10, 6), torch.float32, None)[:5].double()
    norm_weight_D = weights.load("norm.weight", (6,), torch.float32, None).double()
    normed = torch.nn.functional.rms_norm(expected, (6,), norm_weight_D, 1e-5)
    assert isinstance(out, Sharded) and out.axis == "tp"
    torch.testing.assert_close(out.local.double(), normed @ weight_OD.T, rtol=0, atol=1e-5)


def test_a_sum_that_is_owed_is_neither_forgotten_nor_taken_twice(
    fused_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, _ = normed_linear(torch.zeros(4, 6))
    residual, term = torch.zeros(4, 6), Partial(torch.ones(4, 6), "tp")
    layer(term, residual)
    wrong: tuple[tuple[Any, Any], ...] = (
        (term, residual),
        (Sharded(torch.ones(4, 6), "tp", -1), residual),
        (None, Partial(residual, "tp")),
    )
    for update, stream in wrong:
        with pytest.raises(PlacementError):
            layer(update, stream)
    monkeypatch.setattr(norm, "reduce", lambda value, mesh: value)
    with pytest.raises(PlacementError):
        layer(Partial(torch.ones(4, 6), "tp"), residual)
