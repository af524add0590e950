"""Single tokens by one kernel, which makes heads ready, stores and attends: who plans it so, who binds it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from lockstep.attention import sharing
from lockstep.attention.backend import AttentionSpec, FreshHeads, Span
from lockstep.attention.choice import choose_backend
from lockstep.attention.paged_backend import PagedBackend
from lockstep.attention.table_parts import DecodeTables, ExtendTables
from lockstep.core.capabilities import Capabilities
from lockstep.core.errors import KernelError
from lockstep.kv.pool.pool import LayerKV
from lockstep.ops import selection
from lockstep.ops.attention_extend.cases import Layer
from lockstep.ops.background import BackgroundCompiler
from lockstep.ops.contract import Kernel, Signature
from lockstep.ops.norm_rope_store.reference import norm_rope_store
from lockstep.ops.registry import kernels
from lockstep.ops.selection import KernelSelector

pytestmark = pytest.mark.suite("cpu")

OP = "norm_rope_attention_decode"
PAGE_SIZE = 4
LAYER = Layer(6, 2, 32, PAGE_SIZE, window=7, soft_cap=5.0, sinks=True)
HOST = torch.device("cpu")


def referring(op: str) -> Kernel:
    """The reference, which no graph could hold if it said so."""
    return replace(kernels(op)[0], asks_host=False)


def backend_of(fresh: Kernel | None = None, shared: Kernel | None = None) -> PagedBackend:
    decode = DecodeTables(referring("attention_decode"), shared, referring(OP) if fresh is None else fresh)
    return PagedBackend(decode, ExtendTables(referring("attention_extend")))


def fresh_heads(num_rows: int) -> FreshHeads:
    heads = torch.randn(num_rows, LAYER.heads + 2 * LAYER.kv_heads, LAYER.head_dim)
    angles = torch.rand(num_rows, LAYER.head_dim // 2) * 100
    q_weight, k_weight = 1 + 0.1 * torch.randn(2, LAYER.head_dim)
    return FreshHeads(heads, q_weight, k_weight, 1e-6, angles.cos(), angles.sin())


def pool_of(num_pages: int) -> LayerKV:
    return LayerKV(*torch.randn(2, LAYER.kv_heads, num_pages, PAGE_SIZE, LAYER.head_dim))


def spec() -> AttentionSpec:
    return AttentionSpec(LAYER.scale, LAYER.window, LAYER.soft_cap, torch.randn(LAYER.heads))


def in_parts(fresh: FreshHeads, kv: LayerKV, spans: Sequence[Span], how: AttentionSpec) -> torch.Tensor:
    """One operator after the other, with slots as the host knows them; rows after the spans are padding."""
    backend = PagedBackend(
        DecodeTables(referring("attention_decode")), ExtendTables(referring("attention_extend"))
    )
    slots = [span.page_ids[span.start // PAGE_SIZE] * PAGE_SIZE + span.start % PAGE_SIZE for span in spans]
    slots += [-1] * (len(fresh.heads_TAH) - len(spans))
    q_TNH = torch.empty(len(fresh.heads_TAH), LAYER.heads, LAYER.head_dim)
    norm_rope_store(*fresh, kv.k_NPSH, kv.v_NPSH, torch.tensor(slots), q_TNH)
    plan = backend.plan(spans, page_size=PAGE_SIZE, windows=(0,), device=HOST)
    assert not backend.takes_fresh(plan)
    return backend.run(plan, q_TNH, kv, how)


def random_spans(lengths: Sequence[int]) -> list[Span]:
    """Single tokens after so many keys, on pages in no order."""
    counts = [length // PAGE_SIZE + 1 for length in lengths]
    pages = torch.randperm(sum(counts)).split(counts)
    return [Span(length, 1, own.tolist()) for length, own in zip(lengths, pages, strict=True)]


def assert_same(backend: PagedBackend, plan: Any, spans: Sequence[Span], num_rows: int) -> None:
    """Results and pools are those of the parts."""
    fresh, how, kv = fresh_heads(num_rows), spec(), pool_of(40)
    other = LayerKV(kv.k_NPSH.clone(), kv.v_NPSH.clone())
    assert backend.takes_fresh(plan)
    found = backend.run_fresh(plan, fresh, kv, how)
    torch.testing.assert_close(found, in_parts(fresh, other, spans, how))
    assert torch.equal(kv.k_NPSH, other.k_NPSH) and torch.equal(kv.v_NPSH, other.v_NPSH)
    assert not found[len(spans) :].any()


def test_a_planned_step_with_padding_behind_it() -> None:
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    backend = backend_of()
    for lengths in ((0,), (3, 4, 5), (11, 0, 7, 8, 20), (1,) * 9):
        spans = random_spans(lengths)
        plan = backend.plan(spans, page_size=PAGE_SIZE, windows=(0,), device=HOST)
        for num_padding in (0, 3):
            assert_same(backend, plan, spans, len(spans) + num_padding)


def test_a_fixed_plan_is_followed() -> None:
    torch.manual_seed(4)
    backend = backend_of()
    num_keys_T = torch.zeros(5, dtype=torch.int32)
    plan = backend.fixed_plan(num_keys_T, num_pages=12, page_size=PAGE_SIZE)
    assert_same(backend, plan, [], 5)
    for lengths in ((9, 2, 16, 3, 4), (10, 3), (7, 0, 0)):
        spans = random_spans(lengths)
        num_keys_T.zero_()[: len(spans)] = torch.tensor([length + 1 for length in lengths])
        backend.refill(plan, spans)
        assert_same(backend, plan, spans, 5)


def test_other_plans_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "FEWEST_SAVED", PAGE_SIZE)
    backend = backend_of(shared=referring("attention_decode_shared"))
    assert backend.why_no_graphs is None

    def takes(*spans: Span) -> bool:
        return backend.takes_fresh(backend.plan(spans, page_size=PAGE_SIZE, windows=(0,), device=HOST))

    one, other = Span(9, 1, [1, 2, 3]), Span(8, 1, [4, 5, 6])
    assert takes(one, other) and takes(one)
    assert not takes(one, Span(0, 3, [7])), "a longer span beside it"
    assert not takes(Span(0, 3, [7])) and not takes()
    assert not takes(one, Span(8, 1, [1, 2, 6])), "keys are shared"
    num_keys_T = torch.zeros(2, dtype=torch.int32)
    fixed = [
        backend.fixed_plan(num_keys_T, num_pages=3, page_size=4, shares=shares) for shares in (False, True)
    ]
    assert [backend.takes_fresh(plan) for plan in fixed] == [True, False]


def test_without_such_a_kernel_heads_have_to_be_ready() -> None:
    parts = DecodeTables(referring("attention_decode")), ExtendTables(referring("attention_extend"))
    backend, spans = PagedBackend(*parts), [Span(3, 1, [0])]
    plan = backend.plan(spans, page_size=PAGE_SIZE, windows=(0,), device=HOST)
    with pytest.raises(KernelError, match="reference takes heads that are ready"):
        backend.run_fresh(plan, fresh_heads(1), pool_of(1), spec())
    asking = backend_of(kernels(OP)[0])
    assert asking.why_no_graphs == f"{OP}.reference reads values on the host"


GPU = Capabilities(platform="rocm", device_type="cuda", device_name="a test", features=frozenset({"triton"}))


def without_windows(signature: Signature) -> str | None:
    return "knows no windows" if signature["window"] else None


@pytest.fixture
def together_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of the operator for the device of these tests."""
    only = frozenset({"rocm"})
    together = replace(referring(OP), provider="together", platforms=only, refuses=without_windows)
    monkeypatch.setattr(selection, "kernels", lambda op: (*kernels(op), together) if op == OP else kernels(op))


@pytest.mark.parametrize(
    ("layer", "options", "bound"),
    [
        (Layer(4, 2), {}, ["together"]),
        (Layer(4, 2, window=8), {}, ["parts"]),
        (Layer(4, 2), {"forced": {OP: "reference"}}, ["parts"]),
        (Layer(4, 2), {"forced": {"attention_decode": "triton"}}, ["parts"]),
        (Layer(4, 2), {"forced": {"norm_rope_store": "triton"}}, ["parts"]),
        (Layer(4, 2), {"forced": {"*": "triton"}}, ["parts"]),
        (Layer(4, 2), {"name": "triton"}, []),
        (Layer(4, 2), {"fresh_signature": None}, []),
    ],
    ids=[
        "bound",
        "window",
        "off",
        "attention forced",
        "store forced",
        "all forced",
        "backend named",
        "layers differ",
    ],
)
def test_which_kernel_is_bound(
    layer: Layer, options: dict[str, Any], bound: list[str], together_here: None
) -> None:
    signature = layer.signature(torch.bfloat16)
    given = {"name": "auto", "fresh_signature": {**signature, "weight_dtype": None}, **options}
    backend, bindings = choose_backend(
        given.pop("name"),
        KernelSelector(GPU, ("triton",), forced=given.pop("forced", None)),
        ("triton",),
        signature,
        **given,
    )
    assert [each.kernel.provider for each in bindings if each.op == OP] == bound
    assert isinstance(backend, PagedBackend)
    plan = backend.plan([Span(3, 1, [0])], page_size=16, windows=(0,), device=HOST)
    assert backend.takes_fresh(plan) is (bound == ["together"])


class _Noting(BackgroundCompiler):
    """Notes what it is given."""

    def __init__(self) -> None:
        self.given: list[tuple[str, str]] = []

    def add(self, kernel: Kernel, signature: Signature) -> None:
        self.given.append((kernel.op, kernel.provider))


def test_what_is_bound_is_compiled_in_the_background(together_here: None) -> None:
    signature = Layer(4, 2).signature(torch.bfloat16)
    fresh, noting = {**signature, "weight_dtype": None}, _Noting()
    selector = KernelSelector(GPU, ("triton",), background=noting)
    choose_backend("auto", selector, ("triton",), signature, fresh_signature=fresh)
    assert (OP, "together") in noting.given
