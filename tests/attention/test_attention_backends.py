"""What backends plan: steps of every kind against the contract, mixed orders, fixed memory for graphs."""

from __future__ import annotations

import pytest
import torch
from backend_kernels import backend_kernel

from lockstep.attention.backend import AttentionBackend, AttentionSpec, Span
from lockstep.attention.choice import OPERATORS
from lockstep.attention.paged_backend import PagedBackend
from lockstep.attention.table_parts import DecodeTables, ExtendTables
from lockstep.attention.torch_backend import TorchBackend
from lockstep.core.errors import KernelError
from lockstep.kv.pool.pool import LayerKV
from lockstep.ops.attention_extend.cases import Layer, paged_inputs
from lockstep.ops.check import check_kernel
from lockstep.ops.contract import Kernel
from lockstep.ops.registry import contracts, kernels

pytestmark = pytest.mark.suite("cpu")

PAGE_SIZE = 4
LAYER = Layer(6, 2, 32, PAGE_SIZE)
HOST = torch.device("cpu")


def kernel(op: str, provider: str) -> Kernel:
    return next(each for each in kernels(op) if each.provider == provider)


def paged(provider: str) -> PagedBackend:
    decode, extend = (kernel(op, provider) for op in OPERATORS)
    return PagedBackend(DecodeTables(decode), ExtendTables(extend))


BACKENDS = [TorchBackend(), paged("torch"), paged("reference")]
NAMES = ["torch planned once", "torch", "reference"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("backend", BACKENDS, ids=NAMES)
@pytest.mark.parametrize("seed", [0, 1])
def test_backend_meets_the_contract(backend: AttentionBackend, seed: int) -> None:
    tested = backend_kernel(backend, kernel("attention_extend", backend.name))
    report = check_kernel(contracts()["attention_extend"], tested, seed=seed)
    print(f"seed {seed}: {report.num_cases} cases, worst {report.worst_share:.2f} in {report.worst_case}")
    assert report.passed, report.failures


def step(lengths: list[tuple[int, int]], num_padding_rows: int) -> tuple[torch.Tensor, LayerKV, list[Span]]:
    """(new tokens, keys) of each sequence to queries, a pool and spans."""
    num_rows = sum(rows for rows, _ in lengths) + num_padding_rows
    generator = torch.Generator().manual_seed(7)
    made = paged_inputs(generator, LAYER, torch.float32, num_rows, [keys for _, keys in lengths])
    tables = zip(lengths, made.page_table_BP.tolist(), strict=True)
    spans = [Span(keys - rows, rows, [page for page in pages if page >= 0]) for (rows, keys), pages in tables]
    return made.q_TNH, LayerKV(made.k_KPSH, made.v_KPSH), spans


def one_by_one(q_TNH: torch.Tensor, kv: LayerKV, spans: list[Span], spec: AttentionSpec) -> torch.Tensor:
    """Each token alone, over keys picked slot by slot in float64, by torch's own attention."""
    out = torch.zeros_like(q_TNH)
    row = 0
    for span in spans:
        for position in range(span.start, span.num_kv_tokens):
            first = max(0, position - spec.window + 1) if spec.window else 0
            slots = [(span.page_ids[at // PAGE_SIZE], at % PAGE_SIZE) for at in range(first, position + 1)]
            k, v = (
                torch.stack([pool[:, page, slot] for page, slot in slots], dim=1).double()
                for pool in (kv.k_NPSH, kv.v_NPSH)
            )
            one = torch.nn.functional.scaled_dot_product_attention(
                q_TNH[row].double()[:, None], k, v, scale=spec.scale, enable_gqa=True
            )
            out[row] = one[:, 0].float()
            row += 1
    return out


@pytest.mark.parametrize("backend", BACKENDS, ids=NAMES)
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 9), (1, 30), (5, 12)],
        [(5, 12), (1, 9), (1, 30)],
        [(1, 9), (3, 3), (1, 2), (7, 20), (1, 1)],
        [(1, 3), (1, 50), (1, 7), (1, 1)],
        [(9, 9)],
        [],
    ],
    ids=str,
)
@pytest.mark.parametrize("num_padding_rows", [0, 3])
def test_mixed_steps(
    backend: AttentionBackend, lengths: list[tuple[int, int]], window: int, num_padding_rows: int
) -> None:
    """In any order, and with rows of padding after them, which become zeros."""
    q, kv, spans = step(lengths, num_padding_rows)
    spec = AttentionSpec(LAYER.scale, window)
    plan = backend.plan(spans, page_size=PAGE_SIZE, windows=(0, window), device=HOST)
    found = backend.run(plan, q, kv, spec)
    torch.testing.assert_close(found, one_by_one(q, kv, spans, spec), atol=1e-5, rtol=1e-5)
    assert not found[sum(rows for rows, _ in lengths) :].any()


def test_a_fixed_plan_computes_what_was_written_last() -> None:
    backend, spec = paged("reference"), AttentionSpec(LAYER.scale)
    num_keys_T = torch.zeros(4, dtype=torch.int32)
    plan = backend.fixed_plan(num_keys_T, num_pages=20, page_size=PAGE_SIZE)
    memory = [plan.decode.page_table_BP, plan.decode.num_keys_B]
    addresses = [tensor.data_ptr() for tensor in memory]
    assert addresses[1] == num_keys_T.data_ptr()
    q, kv, spans = step([(1, 9), (1, 30), (1, 1), (1, 77)], 0)
    assert not backend.run(plan, q, kv, spec).any(), "all rows are padding at first"
    for chosen in (spans, spans[1:3], spans[3:], []):
        lengths = [span.num_kv_tokens for span in chosen]
        num_keys_T.copy_(torch.tensor([*lengths, *[0] * (4 - len(chosen))]))
        backend.refill(plan, chosen)
        found = backend.run(plan, q, kv, spec)
        torch.testing.assert_close(found, one_by_one(q, kv, chosen, spec), atol=1e-5, rtol=1e-5)
    assert [tensor.data_ptr() for tensor in memory] == addresses
    assert all(address % 16 == 0 for address in addresses)


def test_what_does_not_fit_a_fixed_plan() -> None:
    backend = paged("reference")
    plan = backend.fixed_plan(torch.zeros(2, dtype=torch.int32), num_pages=16, page_size=PAGE_SIZE)
    short = Span(3, 1, [0])
    with pytest.raises(KernelError, match="3 sequences do not fit page tables for 2"):
        backend.refill(plan, [short] * 3)
    with pytest.raises(KernelError, match="17 pages does not fit page tables of 16"):
        backend.refill(plan, [Span(64, 1, list(range(17)))])
    with pytest.raises(KernelError, match="only plans of single tokens"):
        backend.refill(plan, [Span(0, 2, [0])])
    extend_plan = backend.plan([Span(0, 2, [0])], page_size=PAGE_SIZE, windows=(0,), device=HOST)
    with pytest.raises(KernelError, match="only plans of single tokens"):
        backend.refill(extend_plan, [short])
