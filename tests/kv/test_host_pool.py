"""Pages that go to host memory and come back, and how the layers of a pool lie."""

from __future__ import annotations

import secrets

import pytest
import torch
from host_copies import LAYERS, NUM_HOST_PAGES, make, mismatches

from lockstep.platforms.registry import load_platform

pytestmark = pytest.mark.suite("cpu", seconds=4)


def test_copies_are_as_if_made_one_after_the_other() -> None:
    assert mismatches("cpu", lambda: None, secrets.randbelow(2**31)) == 0


def test_a_device_that_torch_does_not_know() -> None:
    device = load_platform("sim").device()
    assert mismatches(device, lambda: None, secrets.randbelow(2**31)) == 0


def test_layers_are_views_of_stacks_in_order() -> None:
    pool, host = make("cpu")
    assert [layer.k_NPSH.shape[0] for layer in pool.layers] == [shape.num_kv_heads for shape in LAYERS]
    first, other, last = pool.layers
    alike, single = pool.stacks
    assert all(
        torch.equal(tensor, alike[at]) and tensor.is_contiguous()
        for at, tensor in enumerate((first.k_NPSH, first.v_NPSH, last.k_NPSH, last.v_NPSH))
    )
    assert torch.equal(other.v_NPSH, single[1])
    assert pool.total_bytes == sum(stack.nbytes for stack in pool.stacks)
    assert host.total_bytes == NUM_HOST_PAGES * pool.total_bytes // pool.num_pages
