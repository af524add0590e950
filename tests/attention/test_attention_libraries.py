"""What is asked of FlashInfer and cuDNN, of stand-ins that compute what the libraries' documentation says."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_cudnn
import fake_flashinfer
import pytest
import torch
from backend_kernels import backend_kernel

from lockstep.attention.backend import AttentionSpec, Span
from lockstep.attention.choice import OPERATORS, choose_backend
from lockstep.attention.cudnn_part import CudnnDecode
from lockstep.attention.flashinfer_parts import FlashInferDecode, FlashInferExtend
from lockstep.attention.paged_backend import PagedBackend
from lockstep.attention.table_parts import ExtendTables
from lockstep.core.capabilities import Capabilities
from lockstep.core.errors import ConfigError, KernelError
from lockstep.kv.pool.pool import LayerKV
from lockstep.ops.attention_decode.kernels import cudnn
from lockstep.ops.attention_decode.kernels import flashinfer as decode_flashinfer
from lockstep.ops.attention_extend.cases import Layer, paged_inputs
from lockstep.ops.attention_extend.kernels import flashinfer
from lockstep.ops.check import check_kernel
from lockstep.ops.contract import Kernel, Signature
from lockstep.ops.registry import contracts, kernels
from lockstep.ops.selection import KernelSelector
from lockstep.platforms.cuda import CudaPlatform

pytestmark = pytest.mark.suite("cpu")

HOPPER = Capabilities(
    platform="cuda",
    device_type="cuda",
    device_name="a test",
    features=frozenset({"sm_90", "triton"}),
    has_triton=True,
)
PLAIN = Layer(32, 8, 128).signature(torch.bfloat16)
PREFERENCE, EXTEND_PREFERENCE = ("triton", "flashinfer", "torch"), CudaPlatform.extend_preference
HOST = torch.device("cpu")


def kernel(op: str, provider: str) -> Kernel:
    return next(each for each in kernels(op) if each.provider == provider)


REFERENCE = kernel("attention_extend", "reference")


def refuses_extras(signature: Signature) -> str | None:
    """The stand-ins have no soft caps and sinks, and need not be quick: few of the longest cases do."""
    if signature["soft_cap"] or signature["sinks"] or signature["dtype"] != torch.bfloat16:
        return "not there"
    return None


@pytest.fixture
def seed() -> int:
    found = secrets.randbelow(2**31)
    print(f"seed {found}")
    return found


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pretend_installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    really = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: name in names or really(name, *rest) or None
    )


@pytest.fixture
def jit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> fake_flashinfer.FakeJit:
    """FlashInfer, with a compiler at hand and nothing compiled."""
    made = fake_flashinfer.FakeJit(tmp_path)
    names = ("BatchPrefillWithPagedKVCacheWrapper", "BatchDecodeWithPagedKVCacheWrapper")
    package = SimpleNamespace(jit=made, **{name: getattr(fake_flashinfer, name) for name in names})
    for module in (flashinfer, decode_flashinfer):
        monkeypatch.setattr(module, "library", lambda: package)
    monkeypatch.setattr(flashinfer, "_failed", {})
    monkeypatch.setattr(flashinfer.shutil, "which", lambda name: f"/somewhere/{name}")
    pretend_installed(monkeypatch, "flashinfer")
    flashinfer._import_error.cache_clear()
    compiler = tmp_path / "toolkit" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.touch()
    return made


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[fake_cudnn.FakeGraph]:
    """cuDNN."""
    package = fake_cudnn.fake_library()
    monkeypatch.setattr(cudnn, "library", lambda: package)
    monkeypatch.setattr(cudnn, "_handle", lambda device: "handle")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(fake_cudnn.FakeGraph, "num_built", 0)
    cudnn._calls_one_by_one.cache_clear()
    return fake_cudnn.FakeGraph


def assert_meets_contract(tested: Kernel, seed: int) -> None:
    report = check_kernel(contracts()[tested.op], replace(tested, refuses=refuses_extras), seed=seed)
    print(f"{tested.provider}: {report.num_cases} cases, worst {report.worst_share:.2f} in {report.worst_case}")
    assert report.passed and report.num_cases > 8, report.failures


@pytest.mark.parametrize("op", OPERATORS)
def test_flashinfer_is_asked_for_what_the_contract_says(
    op: str, jit: fake_flashinfer.FakeJit, seed: int
) -> None:
    assert_meets_contract(kernel(op, "flashinfer"), seed)


def test_cudnn_is_asked_for_what_the_contract_says(graphs: type[fake_cudnn.FakeGraph], seed: int) -> None:
    assert_meets_contract(kernel("attention_decode", "cudnn"), seed)


def flashinfer_backend() -> PagedBackend:
    decode, extend = (kernel(op, "flashinfer") for op in OPERATORS)
    return PagedBackend(FlashInferDecode(decode), FlashInferExtend(extend))


def cudnn_backend() -> PagedBackend:
    return PagedBackend(CudnnDecode(kernel("attention_decode", "cudnn")), ExtendTables(REFERENCE))


def mixed_backend() -> PagedBackend:
    return PagedBackend(FlashInferDecode(kernel("attention_decode", "flashinfer")), ExtendTables(REFERENCE))


@pytest.mark.parametrize("make", [flashinfer_backend, cudnn_backend, mixed_backend])
def test_backends_meet_the_contract(
    make: Callable[[], PagedBackend],
    jit: fake_flashinfer.FakeJit,
    graphs: type[fake_cudnn.FakeGraph],
    seed: int,
) -> None:
    planned_by = replace(REFERENCE, refuses=refuses_extras)
    assert_meets_contract(backend_kernel(make(), planned_by), seed)


def step(
    lengths: tuple[tuple[int, int], ...],
    layer: Layer,
    seed: int,
    num_padding_rows: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, LayerKV, list[Span]]:
    """(new tokens, keys) of each sequence to queries, a pool and spans."""
    num_rows = sum(rows for rows, _ in lengths) + num_padding_rows
    generator = torch.Generator().manual_seed(seed)
    made = paged_inputs(generator, layer, dtype, num_rows, [keys for _, keys in lengths])
    tables = zip(lengths, made.page_table_BP.tolist(), strict=True)
    spans = [Span(keys - rows, rows, [page for page in pages if page >= 0]) for (rows, keys), pages in tables]
    return made.q_TNH, LayerKV(made.k_KPSH, made.v_KPSH), spans


def expected(q: torch.Tensor, kv: LayerKV, spans: list[Span], spec: AttentionSpec) -> torch.Tensor:
    """The reference's, which other tests hold against the definition."""
    backend = PagedBackend(ExtendTables(REFERENCE), ExtendTables(REFERENCE))
    plan = backend.plan(spans, page_size=kv.k_NPSH.shape[2], windows=(), device=HOST)
    return backend.run(plan, q, kv, spec)


def test_layers_of_a_kind_share_a_plan(jit: fake_flashinfer.FakeJit, seed: int) -> None:
    """Two kinds in a model of six layers: two plans for each half of a step; scales may differ all the same."""
    layer = Layer(4, 2, 32)
    q, kv, spans = step(((1, 40), (1, 3), (9, 20)), layer, seed, num_padding_rows=2)
    backend = flashinfer_backend()
    for number in (1, 2):
        plan = backend.plan(spans, page_size=16, windows=(0, 7), device=HOST)
        for window, scale in ((0, 0.2), (7, 0.2), (0, 0.2), (7, 0.3), (0, 0.4), (7, 0.2)):
            spec = AttentionSpec(scale, window)
            found = backend.run(plan, q, kv, spec)
            torch.testing.assert_close(found, expected(q, kv, spans, spec))
        for part in (plan.decode, plan.extend):
            assert [call._wrapper.num_plans for call in part.planned.values()] == [number, number]


def test_a_fixed_plan_of_flashinfer_follows_its_refills(jit: fake_flashinfer.FakeJit, seed: int) -> None:
    layer, spec = Layer(6, 1, 32, 4), AttentionSpec(0.3, 9)
    backend = flashinfer_backend()
    assert backend.why_no_graphs is None
    q, kv, spans = step(((1, 9), (1, 30), (1, 1), (1, 77)), layer, seed)
    plan = backend.fixed_plan(torch.zeros(4, dtype=torch.int32), num_pages=20, page_size=4)
    assert not backend.run(plan, q, kv, spec).any(), "all rows are padding at first"
    addresses = {each.data_ptr() for each in plan.decode.batch._memory}
    for chosen in (spans, spans[1:3], spans[3:], [], spans):
        backend.refill(plan, chosen)
        found = backend.run(plan, q, kv, spec)
        torch.testing.assert_close(found, expected(q, kv, chosen, spec))
    (call,) = plan.decode.planned.values()
    assert {each.data_ptr() for each in call._wrapper._fixed} == addresses
    with pytest.raises(KernelError, match="5 sequences do not fit a plan for 4"):
        backend.refill(plan, [*spans, spans[0]])
    with pytest.raises(KernelError, match="21 pages does not fit a plan for 20"):
        backend.refill(plan, [Span(80, 1, list(range(21)))])


def test_cudnn_takes_no_graphs_and_makes_few_of_its_own(graphs: type[fake_cudnn.FakeGraph], seed: int) -> None:
    """Steps of similar sizes share one; a step of other sizes makes another."""
    backend, layer, spec = cudnn_backend(), Layer(4, 2, 32), AttentionSpec(0.3)
    assert "planned anew" in str(backend.why_no_graphs)
    with pytest.raises(KernelError, match="no plan can be fixed: attention by cudnn"):
        backend.fixed_plan(torch.zeros(1, dtype=torch.int32), num_pages=1, page_size=16)
    pools = None
    for keys, num_built in (((20, 90, 1), 1), ((100, 64), 1), ((70,), 2), ((3, 250, 256, 7), 2), ((257,), 3)):
        lengths = tuple((1, num_keys) for num_keys in keys)
        q, kv, spans = step(lengths, layer, seed, dtype=torch.bfloat16)
        # One pool, as an engine has: a graph is made for it.
        pools = pools or LayerKV(*(torch.zeros(2, 64, 16, 32, dtype=q.dtype) for _ in range(2)))
        for pool, made in zip((pools.k_NPSH, pools.v_NPSH), (kv.k_NPSH, kv.v_NPSH), strict=True):
            pool[:, : made.shape[1]] = made
        plan = backend.plan(spans, page_size=16, windows=(0,), device=HOST)
        found = backend.run(plan, q, pools, spec)
        torch.testing.assert_close(found, expected(q, pools, spans, spec), atol=0.02, rtol=0.02)
        assert graphs.num_built == num_built


def choose(name: str = "auto", **options: Any) -> tuple[list[str], str]:
    """Providers of decoding and extending, and why the best one for extending was refused."""
    selector = KernelSelector(HOPPER, ("reference",), **options)
    order = {"extend_preference": EXTEND_PREFERENCE, "compile_ahead": True}
    _, bindings = choose_backend(name, selector, PREFERENCE, PLAIN, **order)
    refused = bindings[1].refused
    return [each.kernel.provider for each in bindings[:2]], refused[0][1] if refused else ""


def test_each_operator_has_its_own_best(jit: fake_flashinfer.FakeJit) -> None:
    """Compiled ahead: what is bound, nothing else, and nothing twice."""
    for _ in range(2):
        assert choose() == (["triton", "flashinfer"], "")
        assert [name.partition("_")[0] for name in jit.built] == ["fa3"]
    assert choose("flashinfer")[0] == ["flashinfer"] * 2
    assert [name.partition("_")[0] for name in jit.built] == ["fa3", "decode"]


def test_a_provider_of_one_operator_leaves_the_other_to_the_best(
    jit: fake_flashinfer.FakeJit, graphs: type[fake_cudnn.FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN only decodes; whoever asks for it by name is told where it cannot."""
    with pytest.raises(ConfigError, match=r"--attention-backend cudnn cannot be used: .* is not installed"):
        choose("cudnn")
    pretend_installed(monkeypatch, "flashinfer", "cudnn")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert choose("cudnn") == (["cudnn", "flashinfer"], "")
    assert choose("cudnn", strict=True) == (["cudnn", "flashinfer"], "")
    assert choose("cudnn", forced={"attention_extend": "torch"})[0] == ["cudnn", "torch"]


def test_layers_with_and_without_a_window_are_both_compiled(jit: fake_flashinfer.FakeJit) -> None:
    flashinfer.compile_ahead({**PLAIN, "window": 512})
    assert [name.endswith("True_False_False") for name in jit.built] == [False, True]
    decode_flashinfer.compile_ahead({**PLAIN, "heads": 40})
    assert jit.built[2].startswith("fa2")


def test_explaining_compiles_nothing(jit: fake_flashinfer.FakeJit) -> None:
    selector = KernelSelector(HOPPER, ("reference",))
    _, bindings = choose_backend("auto", selector, PREFERENCE, PLAIN, extend_preference=EXTEND_PREFERENCE)
    assert not jit.built and bindings[1].kernel.provider == "triton"
    assert "not compiled yet: loading a model compiles it" in bindings[1].refused[0][1]


def test_without_a_compiler(jit: fake_flashinfer.FakeJit) -> None:
    """What was compiled elsewhere serves; what was not says what to do."""
    (jit.folder / "toolkit" / "bin" / "nvcc").unlink()
    providers, reason = choose()
    assert providers == ["triton", "triton"] and not jit.built
    assert "nvcc is not here: install it, or copy" in reason and str(jit.folder) in reason
    with pytest.raises(
        ConfigError, match=r"--attention-backend flashinfer cannot be used: .* nvcc is not here"
    ):
        choose("flashinfer")
    name = flashinfer.variants("fa3", PLAIN)[0].name
    (jit.folder / name).mkdir()
    (jit.folder / name / f"{name}.so").touch()
    assert choose() == (["triton", "flashinfer"], "")


def test_a_failed_compilation_is_a_refusal(jit: fake_flashinfer.FakeJit) -> None:
    jit.fails = "[1/9] nvcc -c a.cu\na.cu(3): fatal error: no header\nninja: build stopped: subcommand failed."
    providers, reason = choose()
    assert providers == ["triton", "triton"]
    assert reason == "could not be compiled: a.cu(3): fatal error: no header"


@pytest.mark.parametrize(
    ("provider", "change", "says"),
    [
        ("flashinfer", {}, "the package flashinfer-python is not installed"),
        ("cudnn", {}, "the package nvidia-cudnn-frontend is not installed"),
        ("flashinfer", {"dtype": torch.float32}, "serves torch.bfloat16 or torch.float16"),
        ("cudnn", {"pool_dtype": torch.float16}, "queries and pool alike"),
        ("flashinfer", {"head_dim": 96}, "heads of 64, 128, 256 elements, not 96"),
        ("cudnn", {"page_size": 24}, "pages of a power of two of tokens, not 24"),
        ("flashinfer", {"sinks": True}, "without soft caps and sinks"),
        ("cudnn", {"soft_cap": 5.0}, "without soft caps and sinks"),
    ],
)
def test_what_is_refused(provider: str, change: Signature, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    by_provider = [each for op in OPERATORS for each in kernels(op) if each.provider == provider]
    assert len(by_provider) == (1 if provider == "cudnn" else 2)
    for each in by_provider:
        assert says in str(each.refuses({**PLAIN, **change}))
