"""The native kernels between products: what they refuse, and that neither threads nor company change a bit.

Their values are held against the contracts with those of every other provider; csrc/tests/test_rows.cpp compares each
instruction set with double precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

import pytest
import torch

from lockstep.native import usable_instruction_sets
from lockstep.ops.attention_decode.kernels.native import attention_decode
from lockstep.ops.attention_extend.kernels.native import attention_extend
from lockstep.ops.contract import Kernel
from lockstep.ops.kv_store.kernels.native import kv_store
from lockstep.ops.registry import contracts, kernels
from lockstep.ops.rms_norm.kernels.native import rms_norm

pytestmark = pytest.mark.suite("cpu", seconds=5)

every_instruction_set = pytest.mark.parametrize("instruction_set", usable_instruction_sets() or ("scalar",))

SEED = 20260
HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, NUM_PAGES = 6, 2, 64, 16, 24
OPERATORS = (
    "rms_norm",
    "add_rms_norm",
    "silu_and_mul",
    "gelu_and_mul",
    "rope",
    "kv_store",
    "attention_decode",
    "attention_extend",
)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def pool() -> tuple[torch.Tensor, torch.Tensor]:
    print(f"seed {SEED}")
    torch.manual_seed(SEED)
    shape = (KV_HEADS, NUM_PAGES, PAGE_SIZE, HEAD_DIM)
    return torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def extend(
    pool: tuple[torch.Tensor, torch.Tensor],
    q_TNH: torch.Tensor,
    pages: list[list[int]],
    cu_rows: list[int],
    num_keys: list[int],
    instruction_set: str,
) -> torch.Tensor:
    out_TNH = torch.full_like(q_TNH, torch.nan)
    width = max(map(len, pages))
    table = int32(*(page for row in pages for page in [*row, *[-1] * (width - len(row))])).view(-1, width)
    attention_extend(
        q_TNH,
        *pool,
        table,
        int32(*cu_rows),
        int32(*num_keys),
        None,
        out_TNH,
        0.15,
        0,
        0.0,
        instruction_set=instruction_set,
    )
    return out_TNH


def named(op: str, provider: str) -> Kernel:
    return next(kernel for kernel in kernels(op) if kernel.provider == provider)


@pytest.mark.parametrize("op", OPERATORS)
def test_threads_change_no_bit(op: str, native: ModuleType, threads: Callable[[int], None]) -> None:
    kernel, contract = named(op, f"native_{usable_instruction_sets()[0]}"), contracts()[op]
    cases = [case for case in contract.cases() if kernel.refuses(case.signature) is None]
    assert cases
    for case in cases[:: len(cases) // 12 + 1]:
        seen = []
        for num_threads in (1, 2):
            threads(num_threads)
            arguments = case.make(torch.Generator().manual_seed(SEED))
            out = kernel.function(*arguments)
            written = [
                value for spec, value in zip(contract.arguments, arguments, strict=False) if spec.written
            ]
            seen.append([*(out if isinstance(out, tuple) else [out] if contract.returns else []), *written])
        assert all(torch.equal(one, two) for one, two in zip(*seen, strict=True)), case.name


@every_instruction_set
def test_company_changes_no_bit(
    pool: tuple[torch.Tensor, torch.Tensor], instruction_set: str, native: ModuleType
) -> None:
    """A sequence alone, and the same one between others."""
    q_TNH = torch.randn(90, HEADS, HEAD_DIM)
    pages = [[3], [7, 1, 4, 9, 11, 2], [20, 8]]
    together = extend(pool, q_TNH, pages, [0, 5, 75, 90], [16, 90, 18], instruction_set)
    alone = extend(pool, q_TNH[5:75], pages[1:2], [0, 70], [90], instruction_set)
    assert torch.equal(together[5:75], alone)


@every_instruction_set
def test_the_last_row_of_an_extend_is_a_decode(
    pool: tuple[torch.Tensor, torch.Tensor], instruction_set: str, native: ModuleType
) -> None:
    """Two kernels that share no code for the sums agree, within the rounding of weights to the pool's dtype."""
    q_TNH = torch.randn(33, HEADS, HEAD_DIM)
    pages = [[7, 1, 4, 9]]
    extended = extend(pool, q_TNH, pages, [0, 33], [60], instruction_set)
    out_BNH = torch.empty(1, HEADS, HEAD_DIM)
    table, num_keys = int32(*pages[0])[None], int32(60)
    attention_decode(
        q_TNH[-1:],
        *pool,
        table,
        num_keys,
        None,
        out_BNH,
        0.15,
        0,
        0.0,
        instruction_set=instruction_set,
    )
    assert torch.allclose(extended[-1:], out_BNH, rtol=0, atol=4 / 512)


@pytest.mark.parametrize("page", [-1, NUM_PAGES])
def test_a_page_beyond_the_pool_is_refused(
    pool: tuple[torch.Tensor, torch.Tensor], page: int, native: ModuleType
) -> None:
    with pytest.raises(ValueError, match="beyond the pool"):
        extend(pool, torch.randn(2, HEADS, HEAD_DIM), [[3, page]], [0, 2], [20], "scalar")


def test_keys_without_pages_are_refused(pool: tuple[torch.Tensor, torch.Tensor], native: ModuleType) -> None:
    with pytest.raises(ValueError, match="more keys than its pages"):
        extend(pool, torch.randn(2, HEADS, HEAD_DIM), [[3]], [0, 2], [17], "scalar")


def test_a_slot_beyond_the_pool_is_refused(pool: tuple[torch.Tensor, torch.Tensor], native: ModuleType) -> None:
    row = torch.randn(1, KV_HEADS, HEAD_DIM)
    before = pool[0].clone()
    with pytest.raises(ValueError, match="beyond the pool"):
        kv_store(row, row, *pool, torch.tensor([NUM_PAGES * PAGE_SIZE]), instruction_set="scalar")
    assert torch.equal(pool[0], before)


def test_shapes_and_types_are_checked(native: ModuleType) -> None:
    norm = partial(rms_norm, instruction_set="scalar")
    with pytest.raises(ValueError, match="shapes do not fit"):
        norm(torch.ones(2, 4), torch.ones(5), 1e-6)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        norm(torch.ones(2, 4, dtype=torch.float64), torch.ones(4), 1e-6)


def test_an_instruction_set_that_is_not_usable_is_refused_by_name(native: ModuleType) -> None:
    with pytest.raises(ValueError, match="no instruction set sse9"):
        rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6, instruction_set="sse9")


def test_what_cannot_be_served_is_refused_with_a_reason(native: ModuleType) -> None:
    norm = named("rms_norm", "native_scalar")
    signature = {"dtype": torch.float64, "width": 4, "weight_dtype": torch.float32}
    assert "dtype is torch.float64" in str(norm.refuses(signature))
    attention = named("attention_decode", "native_scalar")
    case = next(case for case in contracts()["attention_decode"].cases() if case.signature["head_dim"] == 40)
    assert "multiple of 16, not 40" in str(attention.refuses(case.signature))
