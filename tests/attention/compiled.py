"""Compiles the Triton programs of attention for a GPU that need not be here: `python compiled.py TARGET`.

Launches nothing: every launch is turned into a compilation for the target. Exits 1 when a program needs more shared
memory than the target has, or lacks its matrix instructions.
"""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lockstep.ops.attention_decode import programs as decode
from lockstep.ops.attention_decode_shared import programs as shared
from lockstep.ops.attention_decode_shared.contract import Group, share_pages
from lockstep.ops.attention_extend import programs as extend
from lockstep.ops.attention_extend import tiles
from lockstep.ops.attention_extend.cases import Layer, paged_inputs

MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16"
# Target, bytes of shared memory for one program, instructions that decoding and extending multiply bfloat16 with.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024, MMA, MMA),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024, MMA, "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024, "v_mfma_f32", "v_mfma_f32"),
}
LAYERS = (
    Layer(32, 8, 128, 16),
    Layer(9, 3, 80, 1, window=100, soft_cap=5.0, sinks=True),
    Layer(8, 8, 256, 64),
)


class TargetDriver:
    """As much of a driver as compiling needs."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiling:
    """Stands in for a program: a launch compiles, and looks at what came out."""

    def __init__(self, program: Any, shared_bytes: int, instruction: str | None) -> None:
        self._program = program
        self._shared_bytes = shared_bytes
        self._instruction = instruction

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compiled(*arguments: Any, **options: Any) -> None:
            found = self._program.warmup(*arguments, grid=grid, **options)
            assembly = found.asm.get("ptx") or found.asm["amdgcn"]
            print(f"{self._program.__name__}: {found.metadata.shared} bytes of shared memory")
            assert found.metadata.shared <= self._shared_bytes, f"{found.metadata.shared} bytes do not fit"
            assert self._instruction is None or self._instruction in assembly, f"no {self._instruction}"

        return compiled


def main(name: str) -> None:
    target, shared_bytes, of_decode, of_extend = TARGETS[name]
    driver.set_active(TargetDriver(target))
    extend._extend = Compiling(extend._extend, shared_bytes, of_extend)
    decode._decode = Compiling(decode._decode, shared_bytes, of_decode)
    shared._decode_shared = Compiling(shared._decode_shared, shared_bytes, None)
    for layer in LAYERS:
        made = paged_inputs(torch.Generator().manual_seed(0), layer, torch.bfloat16, 2, (33, 4000))
        pools, how = (made.k_KPSH, made.v_KPSH), (layer.scale, layer.window, layer.soft_cap)
        at = (made.num_keys_B, made.sinks_N, made.out_TNH)
        cu_rows = torch.tensor([0, 1, 2], dtype=torch.int32)
        print(name, layer)
        decode.decode(made.q_TNH, *pools, made.page_table_BP, *at, *how)
        if not layer.window:
            sharing = share_pages(made.page_table_BP, [Group(32 // layer.page_size, (0, 1))], layer.page_size)
            where = (made.page_table_BP, made.num_keys_B, *sharing)
            shared.decode_shared(made.q_TNH, *pools, *where, *at[1:], layer.scale, layer.soft_cap)
        for enough_tiles in (tiles.ENOUGH_TILES, 0):  # tiles for few rows, then for many
            with patch.object(tiles, "ENOUGH_TILES", enough_tiles):
                extend.extend(made.q_TNH, *pools, made.page_table_BP, cu_rows, *at, *how)


if __name__ == "__main__":
    main(sys.argv[1])
