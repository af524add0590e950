"""The simulated device against the host's own tensors, operator by operator."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.suite("sim")

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def written(x: torch.Tensor, write: Callable[[torch.Tensor], Any]) -> torch.Tensor:
    """`x` after something was written into a part of it."""
    write(x)
    return x


# x: float32 [4, 6], y: float32 [4, 6], i: int64 [3] of different rows.
CALLS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]] = {
    "arithmetic": lambda x, y, i: (x + y) * 2 - y / 3,
    "plain number first": lambda x, y, i: 1 - x,
    "or with a bool": lambda x, y, i: (x > 0) | False,
    "number to where": lambda x, y, i: torch.where(x > 0, x, 0.1),
    "double keeps its digits": lambda x, y, i: torch.where(x > 0, x.double(), 0.1),
    "product": lambda x, y, i: x @ y.T,
    "linear": lambda x, y, i: functional.linear(x, y, y[:, 0]),
    "batched product": lambda x, y, i: torch.matmul(x.view(2, 2, 6), y.view(2, 6, 2)),
    "softmax": lambda x, y, i: x.softmax(-1),
    "norm": lambda x, y, i: torch.rms_norm(x, (6,), y[0], 1e-5),
    "norm in bfloat16": lambda x, y, i: functional.layer_norm(x.bfloat16() * 50, (6,), y[0].bfloat16()),
    "cast": lambda x, y, i: x.to(torch.bfloat16).float(),
    "float8": lambda x, y, i: x.to(torch.float8_e4m3fn).view(torch.uint8),
    "transposed": lambda x, y, i: x.T.contiguous(),
    "reshaped": lambda x, y, i: x.T.reshape(3, 8),
    "unflattened": lambda x, y, i: x.unflatten(-1, (2, 3))[:, 1],
    "bytes": lambda x, y, i: x.view(torch.int32),
    "slices": lambda x, y, i: x[1:, ::2],
    "chunks": lambda x, y, i: x.chunk(2, -1),
    "split": lambda x, y, i: x.split([1, 3], 0),
    "unfold": lambda x, y, i: x.unfold(1, 2, 2),
    "diagonal": lambda x, y, i: x[:, :4].diagonal(),
    "expanded": lambda x, y, i: x[:, None].expand(4, 3, 6).sum(1),
    "index": lambda x, y, i: x[i],
    "index_select": lambda x, y, i: x.index_select(0, i),
    "gather": lambda x, y, i: x.gather(0, i[:, None].expand(3, 6)),
    "boolean mask": lambda x, y, i: x[x > 0],
    "nonzero": lambda x, y, i: (x > 0).nonzero(),
    "embedding": lambda x, y, i: functional.embedding(i, x),
    "index assigned": lambda x, y, i: written(x, lambda x: x.__setitem__(i, y[i] * 2)),
    "number assigned": lambda x, y, i: written(x, lambda x: x.__setitem__((slice(1, None), 2), 7)),
    "index_copy_": lambda x, y, i: written(x, lambda x: x.index_copy_(0, i, y[i])),
    "index_copy_ of a view": lambda x, y, i: written(
        x, lambda x: x.view(2, 2, 6).flatten(0, 1).index_copy_(0, i, y[i])
    ),
    "scatter_": lambda x, y, i: written(x, lambda x: x.scatter_(0, i[:, None], 9.0)),
    "addcmul_ of a part": lambda x, y, i: written(x, lambda x: x[:, :3].addcmul_(y[:, :3], y[:, 3:], value=-1)),
    "zeroed column": lambda x, y, i: written(x, lambda x: x.T[2].zero_()),
    "masked_fill_": lambda x, y, i: x.masked_fill_(y > 0, float("-inf")),
    "transposed in place": lambda x, y, i: x.t_(),
    "out": lambda x, y, i: torch.add(x, y, out=torch.empty_like(x)),
    "out of no size": lambda x, y, i: torch.add(x, y, out=x.new_empty(0)),
    "resized": lambda x, y, i: x.clone().resize_(2, 3),
    "top": lambda x, y, i: x.topk(3),
    "sorted": lambda x, y, i: x.sort(dim=-1, descending=True, stable=True),
    "cumulative": lambda x, y, i: x.cumsum(-1),
    "concatenated": lambda x, y, i: torch.cat((x, y), -1),
    "stacked": lambda x, y, i: torch.stack((x, y)),
    "repeated": lambda x, y, i: x.repeat_interleave(2, 0),
    "made like": lambda x, y, i: (x.new_zeros(2, 2), torch.full_like(x, 3), torch.arange(5, device=x.device)),
    "made from a list": lambda x, y, i: torch.tensor([[1.0, 2.0]], device=x.device) + x[:2, :2],
    "attention": lambda x, y, i: functional.scaled_dot_product_attention(
        x.view(1, 4, 3, 2),
        y.view(1, 4, 3, 2)[:, :2],
        y.view(1, 4, 3, 2)[:, 2:],
        is_causal=True,
        enable_gqa=True,
    ),
    "attention under a mask": lambda x, y, i: functional.scaled_dot_product_attention(
        x[None], y[None], y[None], attn_mask=torch.ones(4, 4, dtype=torch.bool, device=x.device).tril()
    ),
    "numbers": lambda x, y, i: (x.sum().item(), i.tolist(), x.max(-1).indices.tolist(), bool((x > 9).any())),
    "nothing": lambda x, y, i: x[:0] @ y[:0].T.new_zeros(6, 2),
}


def tensors(device: torch.device | str, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(4, 6, generator=generator) for _ in range(2))
    return x.to(device), y.to(device), torch.randperm(4, generator=generator)[:3].to(device)


def assert_same(found: Any, expected: Any) -> None:
    """Values, strides and kinds; `found` may lie on the simulated device."""
    if isinstance(expected, (tuple, list)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, torch.Tensor):
        assert found.device.type == "sim"
        assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-6)
    else:
        assert found == expected


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_gives_what_the_host_gives(call: str, inference: bool, sim: torch.device) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    with torch.inference_mode(inference):
        assert_same(CALLS[call](*tensors(sim, seed)), CALLS[call](*tensors("cpu", seed)))


def test_views_share_storage_and_copies_do_not(sim: torch.device) -> None:
    x = torch.zeros(4, 6, device=sim)
    views = (x[1:], x.T, x.view(-1), x.view(3, 8)[1], x.detach(), x.unfold(1, 2, 2), x.view(torch.int32))
    address = x.untyped_storage().data_ptr()
    assert all(view.untyped_storage().data_ptr() == address for view in views)
    assert all(view.untyped_storage()._cdata == x.untyped_storage()._cdata for view in views)
    x.fill_(1.0)
    assert views[3].tolist() == [1.0] * 8 and views[1].cpu().eq(1).all()
    assert x.clone().untyped_storage().data_ptr() != address


def test_a_tensor_outlives_the_one_it_was_made_from(sim: torch.device) -> None:
    view = torch.arange(1000, device=sim).view(10, 100)[3]
    host = view.cpu()
    rest = [torch.empty(1000, device=sim).fill_(-1) for _ in range(50)]
    assert view.tolist() == host.tolist() == list(range(300, 400)) and rest


def test_host_and_device_do_not_mix(sim: torch.device) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device=sim) + torch.ones(3)


def test_tensors_are_made_under_a_dispatch_mode(sim: torch.device) -> None:
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    with Watching():
        assert (torch.tensor([1, 2], device=sim) + torch.arange(2, device=sim)).tolist() == [1, 3]


def test_host_memory_counts_as_pinned(sim: torch.device) -> None:
    host = torch.arange(3)
    pinned = host.pin_memory()
    assert pinned.device.type == "cpu" and pinned.data_ptr() != host.data_ptr()
    assert pinned.to(sim, non_blocking=True).tolist() == [0, 1, 2]


def test_random_state_is_the_hosts(sim: torch.device) -> None:
    torch.manual_seed(5)
    found = torch.randn(8, device=sim).cpu()
    torch.manual_seed(5)
    assert torch.equal(found, torch.randn(8))


def test_torch_learns_of_it_only_when_the_device_is_asked_for(fresh: Any) -> None:
    asked = """
import torch
from lockstep.platforms.registry import load_platform
platform = load_platform("sim")
print(platform.unavailable_reason(), platform.capabilities().platform, torch._C._get_privateuse1_backend_name())
platform.device()
load_platform("sim").device()
print(platform.unavailable_reason(), torch._C._get_privateuse1_backend_name(), torch.ones(2, device="sim").sum().item())
"""
    assert fresh.output(asked).splitlines() == ["None sim privateuseone", "None sim 2.0"]


def test_a_place_that_is_taken_is_an_error(fresh: Any) -> None:
    taken = """
import torch
torch.utils.rename_privateuse1_backend("other")
from lockstep.platforms.registry import load_platform
print(load_platform("sim").unavailable_reason())
try:
    load_platform("sim").device()
except Exception as error:
    print(type(error).__name__, error)
"""
    first, second = fresh.output(taken).splitlines()
    assert "taken by 'other'" in first
    assert second.startswith("PlatformError ") and "taken by 'other'" in second
