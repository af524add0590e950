"""Products of packed weights, with every instruction set of this processor."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from lockstep.native import thread_pool, usable_instruction_sets
from lockstep.ops.grouped_weight import GroupedWeight
from lockstep.ops.native import pack, take_rows
from lockstep.ops.native_product import native_product

pytestmark = [pytest.mark.suite("cpu", seconds=3), pytest.mark.usefixtures("native", "threads_as_before")]

OUTPUTS, INPUTS = 83, 160


@pytest.fixture
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def grouped(bits: int, has_minimum: bool, group_inputs: int) -> GroupedWeight:
    g = torch.Generator().manual_seed(bits)
    shape = (OUTPUTS, INPUTS // group_inputs)
    scale = (torch.rand(shape, generator=g) * 0.01).half().float()
    minimum = torch.randn(shape, generator=g).half().float() if has_minimum else None
    q = torch.randint(0, 1 << bits, (OUTPUTS, INPUTS), generator=g, dtype=torch.uint8)
    return GroupedWeight(q, scale, minimum, 0 if has_minimum else 1 << (bits - 1), bits)


def weights() -> dict[str, torch.Tensor | GroupedWeight]:
    kinds = ((4, False, 32), (4, True, 32), (8, False, 32), (8, False, 16), (8, True, 32))
    found: dict[str, torch.Tensor | GroupedWeight] = {
        f"{bits} bits by {group_inputs}{' with minima' * has_minimum}": grouped(bits, has_minimum, group_inputs)
        for bits, has_minimum, group_inputs in kinds
    }
    g = torch.Generator().manual_seed(16)
    return found | {"bfloat16": torch.randn(OUTPUTS, INPUTS, generator=g).bfloat16()}


@pytest.mark.parametrize("weight", [pytest.param(weight, id=name) for name, weight in weights().items()])
def test_a_row_is_the_same_bits_in_any_company(weight: torch.Tensor | GroupedWeight) -> None:
    packed = pack(weight)
    seed = torch.seed()
    print(f"seed {seed}")
    # A slice of wider rows, as packed products leave them.
    x_TI = torch.randn(300, INPUTS + 24)[:, :INPUTS]
    bias_O = torch.randn(OUTPUTS)
    for instruction_set in usable_instruction_sets():
        torch.set_num_threads(1)
        alone = [
            native_product(row_I[None], packed, bias_O, instruction_set=instruction_set) for row_I in x_TI[:9]
        ]
        for num_rows in (2, 3, 5, 9, 16, 41, 300):
            for num_threads in (1, 2):
                torch.set_num_threads(num_threads)
                together = native_product(x_TI[:num_rows], packed, bias_O, instruction_set=instruction_set)
                assert together.shape == (num_rows, OUTPUTS)
                expected = torch.cat(alone)[:num_rows]
                assert torch.equal(together[:9], expected), (instruction_set, num_rows, num_threads)


@pytest.mark.parametrize("weight", [pytest.param(weight, id=name) for name, weight in weights().items()])
def test_rows_of_a_packed_weight_are_its_values(weight: torch.Tensor | GroupedWeight) -> None:
    values_OI = weight.dequantise() if isinstance(weight, GroupedWeight) else weight.float()
    ids_T = torch.tensor([0, OUTPUTS - 1, 17, 17])
    for instruction_set in usable_instruction_sets():
        taken = take_rows(pack(weight), ids_T, instruction_set=instruction_set)
        torch.testing.assert_close(taken, values_OI[ids_T], rtol=1e-6, atol=1e-6)


def test_misuse_is_an_error(native: ModuleType) -> None:
    packed = pack(grouped(4, False, 32))
    best = usable_instruction_sets()[0]
    x, out = torch.zeros(2, INPUTS), torch.zeros(2, 96)
    with pytest.raises(ValueError, match="as wide as the weight has inputs"):
        native.product(thread_pool(), 1, packed, x[:, 1:].contiguous().numpy(), best, out.numpy())
    for wrong in (out[:1], out[:, :83].contiguous()):
        with pytest.raises(ValueError, match="padded to a multiple of 16"):
            native.product(thread_pool(), 1, packed, x.numpy(), best, wrong.numpy())
    with pytest.raises(ValueError, match="no instruction set avx1024"):
        native.product(thread_pool(), 1, packed, x.numpy(), "avx1024", out.numpy())
    with pytest.raises(IndexError, match="out of range"):
        take_rows(packed, torch.tensor([OUTPUTS]), instruction_set=best)
