"""Which backend serves a model, why, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lockstep.attention.backend import AttentionBackend
from lockstep.attention.choice import choose_backend
from lockstep.attention.torch_backend import TorchBackend
from lockstep.core.capabilities import Capabilities
from lockstep.core.errors import ConfigError, KernelError
from lockstep.ops.attention_extend.cases import Layer
from lockstep.ops.contract import Signature
from lockstep.ops.selection import Binding, KernelSelector

pytestmark = pytest.mark.suite("cpu")

HERE = Capabilities(platform="here", device_type="cpu", device_name="a test")
GPU = Capabilities(
    platform="rocm", device_type="cuda", device_name="a test", features=frozenset({"triton"}), has_triton=True
)
PLAIN = Layer(4, 2).signature(torch.bfloat16)
CAPPED = Layer(4, 2, soft_cap=30.0).signature(torch.bfloat16)
BOTH = ["attention_decode", "attention_extend"]


def choose(
    name: str, device: Capabilities, order: tuple[str, ...], signature: Signature, **options: Any
) -> tuple[AttentionBackend, tuple[Binding, ...]]:
    """With a selector of these options, whose own preference does not matter."""
    return choose_backend(name, KernelSelector(device, ("reference",), **options), order, signature)


def providers(*given: Any, **options: Any) -> list[str]:
    _, bindings = choose(*given, **options)
    assert [binding.op for binding in bindings] == BOTH
    return [binding.kernel.provider for binding in bindings]


def test_the_first_that_accepts() -> None:
    backend, bindings = choose("auto", HERE, ("triton", "torch"), PLAIN)
    assert isinstance(backend, TorchBackend)
    assert all(each.refused == (("triton", "made for cuda, musa, rocm, not here"),) for each in bindings)
    capped, bindings = choose("auto", HERE, ("torch",), CAPPED)
    assert capped.name == "reference" and "soft-capped" in bindings[0].refused[0][1]
    assert choose("auto", GPU, ("triton", "torch"), CAPPED)[0].name == "triton"
    # Triton is not named, and stands before torch for that.
    assert choose("auto", GPU, ("torch",), PLAIN)[0].name == "triton"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pool_dtype": torch.float16}, "needs queries in the pool's dtype"),
        ({"head_dim": 320}, "up to 256 elements, not 320"),
        ({"heads": 256, "kv_heads": 1}, "up to 128 query heads may share a KV head, not 256"),
    ],
)
def test_what_triton_refuses(change: Signature, says: str) -> None:
    _, bindings = choose("auto", GPU, ("triton", "torch"), {**PLAIN, **change})
    assert all(each.kernel.provider == "torch" and says in each.refused[0][1] for each in bindings)


def test_by_name() -> None:
    assert providers("reference", HERE, ("torch",), PLAIN) == ["reference"] * 2
    _, bindings = choose("torch", HERE, ("torch",), PLAIN)
    assert bindings[0].why == "asked for by --attention-backend torch"
    with pytest.raises(ConfigError, match=r"unknown attention backend 'trch'; did you mean 'torch'\?.*triton"):
        choose("trch", HERE, ("torch",), PLAIN)
    with pytest.raises(ConfigError, match="--attention-backend torch cannot be used: soft-capped"):
        choose("torch", HERE, ("torch",), CAPPED)
    with pytest.raises(ConfigError, match="--attention-backend triton cannot be used: made for cuda"):
        choose("triton", HERE, ("torch",), PLAIN)


def test_forced_kernels_reach_attention() -> None:
    assert providers("auto", HERE, ("torch",), PLAIN, forced={"*": "reference"}) == ["reference"] * 2
    backend, bindings = choose("auto", HERE, ("torch",), PLAIN, forced={"attention_extend": "reference"})
    assert backend.name == "torch and reference"
    assert [binding.kernel.provider for binding in bindings] == ["torch", "reference"]


def test_strict_refuses_a_fallback() -> None:
    with pytest.raises(KernelError, match=r"--strict-kernels: attention_decode\.torch refuses every layer"):
        choose("auto", HERE, ("torch",), CAPPED, strict=True)
    assert providers("auto", HERE, ("triton", "torch"), PLAIN, strict=True) == ["torch"] * 2
