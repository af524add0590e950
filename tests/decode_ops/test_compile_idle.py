"""Triton programs that are compiled before anybody calls for them: without values, and those that calls want."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not here")

from triton_card import compiled_programs

from lockstep.ops.attention_extend.cases import Layer
from lockstep.ops.contract import Kernel
from lockstep.ops.dependent_launch import dependent_launch
from lockstep.ops.registry import kernels
from lockstep.ops.triton_launch import on_meta

pytestmark = pytest.mark.suite("cpu", seconds=25)

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is compiled, by name; nothing is known from before."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        torch, "get_device_module", lambda device: SimpleNamespace(device=lambda device: nullcontext())
    )
    dependent_launch.cache_clear()
    with compiled_programs() as names:
        yield names
    dependent_launch.cache_clear()


def kernel(op: str, provider: str = "triton") -> Kernel:
    return next(each for each in kernels(op) if each.provider == provider)


def decode(layer: Layer, batch: int, width: int, window: int) -> None:
    """A call as a step with prompts makes it, of any pool."""
    q_BNH = on_meta(batch, layer.heads, layer.head_dim, dtype=BF16)
    pool = on_meta(layer.kv_heads, 100, layer.page_size, layer.head_dim, dtype=BF16)
    tables = on_meta(batch, width, dtype=torch.int32), on_meta(batch, dtype=torch.int32)
    how = (None, q_BNH, 0.3, window, 0.0)
    kernel("attention_decode").function(q_BNH, pool, pool, *tables, *how)


@pytest.mark.parametrize("window", [0, 512])
def test_steps_find_every_program_of_decoding(compiled: list[str], window: int) -> None:
    layer = Layer(32, 8, 128, window=window)
    compile_idle = kernel("attention_decode").compile_idle
    assert compile_idle is not None
    for work in compile_idle(layer.signature(BF16), torch.device("cuda:0")):
        work()
    assert set(compiled) == {"_decode"} and len(compiled) <= 6
    before = len(compiled)
    for batch in (1, 2, 3, 7, 16, 33, 64, 100, 256):
        for width in (16, 64, 2560):
            decode(layer, batch, width, window)
    assert len(compiled) == before
