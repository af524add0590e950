"""Which keys a thread block of the decode kernel for Hopper takes, and the kernel through NVIDIA's compiler."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from hopper_card import hopper

from lockstep.ops.norm_rope_attention_decode.hopper_blocks import DecodeBlock, block_of, shared_bytes
from lockstep.ops.registry import kernels

pytestmark = pytest.mark.suite("cpu", seconds=30)

MOST_SHARED_BYTES = 227 * 1024
SIGNATURE = {
    "dtype": torch.bfloat16,
    "pool_dtype": torch.bfloat16,
    "weight_dtype": torch.bfloat16,
    "head_dim": 128,
    "heads": 16,
    "kv_heads": 8,
    "page_size": 16,
    "window": 0,
    "soft_cap": 0.0,
    "sinks": False,
}
BLOCKS = tuple(dict.fromkeys(block_of(heads) for heads in range(1, 3000)))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_fits_a_multiprocessor(block: DecodeBlock) -> None:
    for head_dim in (64, 128):
        results = 4096  # and what else a block keeps
        assert shared_bytes(block, head_dim) + 8 * head_dim * 4 + results <= MOST_SHARED_BYTES
    assert block.cluster in (1, 2, 4, 8), (
        "larger clusters are no portable ones, and 64 results must be shared out"
    )
    assert block.stages <= 32, "a warp knows the pages of 32 turns"


def test_fewer_heads_are_shared_by_more_thread_blocks() -> None:
    clusters = [block_of(heads).cluster for heads in range(1, 200)]
    assert clusters == sorted(clusters, reverse=True) and clusters[0] == 8


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"dtype": torch.float32}, "bfloat16"),
        ({"pool_dtype": torch.float32}, "bfloat16"),
        ({"weight_dtype": torch.float32}, "bfloat16"),
        ({"head_dim": 80}, "not 2 of 80"),
        ({"heads": 72}, "not 9 of 128"),
        ({"page_size": 1}, "pages of 1"),
        ({"window": 100}, "windows"),
        ({"soft_cap": 5.0}, "windows"),
        ({"sinks": True}, "windows"),
    ],
    ids=str,
)
def test_what_it_does_not_serve_has_a_reason(change: dict[str, object], reason: str) -> None:
    (kernel,) = (each for each in kernels("norm_rope_attention_decode") if each.provider == "cuda")
    assert reason in (kernel.refuses({**SIGNATURE, **change}) or "")


def test_without_the_bindings_there_is_no_such_kernel() -> None:
    from lockstep.ops.selection import KernelSelector

    capabilities = hopper("sm_90", "triton")
    selector = KernelSelector(capabilities, ("cuda", "triton", "torch"))
    assert selector.bind_fused("norm_rope_attention_decode", "here", SIGNATURE) is None


pytest.importorskip("cuda.bindings.nvrtc", reason="NVIDIA's bindings are not here")


def test_a_single_row_may_lie_anywhere() -> None:
    """How far it is to a next row that there is not is nobody's concern."""
    from lockstep.ops.norm_rope_attention_decode.hopper import can_be_attended

    pool = torch.zeros(2, 3, 16, 128, dtype=torch.bfloat16)
    cos, sin = torch.zeros(2, 64), torch.zeros(2, 64)

    def heads(rows: int, num_heads: int, stride: int) -> torch.Tensor:
        memory = torch.zeros(4 * num_heads * 128, dtype=torch.bfloat16)
        return memory.as_strided((rows, num_heads, 128), (stride, 128, 1))

    for rows, stride, accepted in ((1, 1, True), (2, 8 * 128, True), (2, 8 * 128 + 1, False)):
        given = ((cos[:rows], sin[:rows]), (pool, pool), heads(rows, 4, 4 * 128))
        assert can_be_attended(heads(rows, 8, stride), *given) is accepted, (rows, stride)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_compiles_without_spilling_and_reads_early_what_is_there(block: DecodeBlock, tmp_path: Path) -> None:
    from triton import knobs

    from lockstep.ops.cuda_program import machine_code
    from lockstep.ops.norm_rope_attention_decode.hopper import Heads, source

    kinds = (
        Heads(8, 128, 16, True, torch.bfloat16),
        Heads(4, 128, 32, True, torch.float16),
        Heads(1, 128, 64, False, torch.float16),
        Heads(7, 64, 48, True, torch.bfloat16),
        Heads(2, 64, 16, True, torch.float16),
    )
    for kind in kinds:
        file = tmp_path / "kernel.cubin"
        file.write_bytes(machine_code(source(block, kind), "sm_90a", None))
        listing = [knobs.nvidia.nvdisasm.path, "-c", file]
        assembly = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
        assert not re.findall(r"\s(STL|LDL)\b", assembly), "registers are spilled"
        assert len(re.findall(r"\sHMMA", assembly)) >= 2 * kind.head_dim // 16
        # Pages are copied before the kernel waits for its predecessor, and heads are read after it.
        before, waits, after = assembly.partition("ACQBULK")
        assert waits and "UTMALDG" in before, "nothing is copied early"
        assert "LDSM" not in before, "keys are multiplied before queries can be there"
        between, starts, rest = after.partition("PREEXIT")
        assert starts and not _loads(between), "the next kernel starts later than it could"
        # Keys of the row, a lane's page and the new key's: a multiprocessor's cache may hold those of steps before.
        early = _loads(before)
        tables = [load for load in early if "STRONG.GPU" in load]
        assert len(tables) == 3 and "CONSTANT" not in assembly, "what is read may be of a step before"
        weights = kind.head_dim // 8 + 2 if kind.norms else 0
        assert len(early) - len(tables) == weights, "norms' weights are not read before the wait"
        # What other thread blocks sent is acquired from them; that costs too much for each tile.
        inner, sends, finish = rest.partition("STAS")
        acquires = r"TRYWAIT.*\n.*CCTL\.IVALL"
        assert sends and re.search(acquires, finish) and not re.search(acquires, inner)


def _loads(assembly: str) -> list[str]:
    """From the device's memory into registers."""
    return re.findall(r"\sLDG\.\S+", assembly)
