"""Parts of attention_decode in Triton's interpreter, with programs in several orders: `python arrivals.py SEED`.

Whatever order parts come in, the results are those of one merge of all of them, bit for bit. Exits 1 when they are not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import product
from math import ceil
from typing import Any
from unittest.mock import patch

import interpreted  # first: it has Triton interpreted
import numpy as np
import torch
import triton.runtime.interpreter as interpreter

from lockstep.ops.arrivals import NUM_COUNTERS, counters_of
from lockstep.ops.attention_decode import programs
from lockstep.ops.attention_decode.reference import attention_decode
from lockstep.ops.attention_extend import tiles
from lockstep.ops.attention_extend.cases import Layer, PagedInputs, paged_inputs

# More parts than are merged at a time, few, one, and none in one launch; heads that are merged at once, in turns and in
# two programs.
CASES = (
    (Layer(2, 1, 32, 16), (600, 0, 32, 1, 90)),
    (Layer(6, 2, 80, 16, soft_cap=5.0, sinks=True), (0, 200)),
    (Layer(7, 1, 32, 1, window=150, sinks=True), (700, 3, 0)),
    (Layer(10, 2, 32, 64, window=70), (65, 500)),
    (Layer(80, 1, 16, 16, sinks=True), (97, 31)),
    (Layer(2, 2, 16, 16), (700,)),
)

Program = tuple[int, int, int]
"""Row, block of heads, part."""

ORDERS: dict[str, Callable[[list[Program]], list[Program]]] = {
    "as they are": lambda programs: programs,
    "backwards": lambda programs: programs[::-1],
    "all first parts first": lambda programs: sorted(programs, key=lambda program: program[2]),
    "all last parts first": lambda programs: sorted(programs, key=lambda program: -program[2]),
}


class Launch:
    """Stands in for the program: launches it with its programs in an order, and keeps its arguments."""

    def __init__(self, program: Any, order: Callable[[list[Program]], list[Program]]) -> None:
        self._program, self._order = program, order
        self.given: Sequence[Any] = ()

    def __getitem__(self, grid: Program) -> Any:
        def launch(*given: Any, **options: Any) -> None:
            self.given = given
            rows, blocks, parts = map(range, grid)
            ordered = iter(self._order(list(product(rows, blocks, parts))))
            builder = interpreter.interpreter_builder
            own = builder.set_grid_idx
            with patch.object(builder, "set_grid_idx", lambda *program: own(*next(ordered))):
                self._program[grid](*given, **options)

        return launch


def decoded(layer: Layer, made: PagedInputs, order: str) -> tuple[torch.Tensor, Launch]:
    out_TNH = made.out_TNH.clone()
    launch = Launch(programs._decode, ORDERS[order])
    with patch.object(programs, "_decode", launch):
        programs.decode(*given_to(layer, made, out_TNH))
    return out_TNH, launch


def given_to(layer: Layer, made: PagedInputs, out_TNH: torch.Tensor) -> list[Any]:
    where = (made.k_KPSH, made.v_KPSH, made.page_table_BP, made.num_keys_B)
    return [made.q_TNH, *where, made.sinks_N, out_TNH, layer.scale, layer.window, layer.soft_cap]


def in_float64(given: Any) -> Any:
    return given.double() if isinstance(given, torch.Tensor) and given.is_floating_point() else given


def merged(part_NJH: np.ndarray, weight_NJ: np.ndarray) -> np.ndarray:
    """Means of weighted parts in float32, in turns as a running softmax has them. Weights are in units of log2."""
    acc_NH, total_N = np.zeros_like(part_NJH[:, 0]), np.zeros_like(weight_NJ[:, 0])
    top_N = np.full_like(total_N, -np.inf)
    for at in range(0, part_NJH.shape[1], tiles.MERGED_PARTS):
        turn = slice(at, at + tiles.MERGED_PARTS)
        new_top_N = np.maximum(top_N, weight_NJ[:, turn].max(1))
        share_NJ = np.exp2(weight_NJ[:, turn] - new_top_N[:, None])
        shrink_N = np.exp2(top_N - new_top_N)
        seen_NH, seen_N = np.zeros_like(acc_NH), np.zeros_like(top_N)
        for share_N, each_NH in zip(share_NJ.T, part_NJH[:, turn].swapaxes(0, 1), strict=True):
            seen_NH, seen_N = seen_NH + each_NH * share_N[:, None], seen_N + share_N
        acc_NH, total_N = acc_NH * shrink_N[:, None] + seen_NH, total_N * shrink_N + seen_N
        top_N = new_top_N
    return acc_NH / total_N[:, None]


def num_used_parts(layer: Layer, num_keys: int, num_parts: int, keys: int) -> int:
    seen = min(num_keys, layer.window) if layer.window else num_keys
    return ceil(seen / (max(1, ceil(ceil(seen / num_parts) / keys)) * keys))


def failures(layer: Layer, num_keys: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[str]:
    made = paged_inputs(torch.Generator().manual_seed(seed), layer, dtype, len(num_keys), num_keys)
    found, wrong = {order: decoded(layer, made, order) for order in ORDERS}, []
    first, launch = found["as they are"]
    expected = torch.empty_like(first, dtype=torch.float64)
    attention_decode(*map(in_float64, given_to(layer, made, expected)))
    rounding = 2e-6 if dtype == torch.float32 else 2**-8
    if not torch.allclose(first.double(), expected, rtol=2 * rounding, atol=2 * rounding):
        wrong.append(f"off by {(first.double() - expected).abs().max():.2g}")
    wrong += [f"other bits {order}" for order, (out, _) in found.items() if not torch.equal(out, first)]
    part_BNJH, weight_BNJ = launch.given[8:10]
    keys = tiles.decode_tile(layer.heads // layer.kv_heads, layer.head_dim, dtype.itemsize).keys
    for row, length in enumerate(num_keys):
        used = num_used_parts(layer, length, part_BNJH.shape[2], keys)
        if used > 1 and layer.heads > layer.kv_heads:
            whole = merged(part_BNJH[row, :, :used].numpy(), weight_BNJ[row, :, :used].numpy())
            if not torch.equal(torch.from_numpy(whole).to(dtype), first[row]):
                wrong.append(f"row {row} is not the merge of its {used} parts")
        elif length == 0 and first[row].any():
            wrong.append(f"row {row} of padding is not zero")
    if counters_of(made.q_TNH.device).any():
        wrong.append("counters are left")
    print(f"{dtype} {layer} {num_keys}, seed {seed}: {part_BNJH.shape[2]} parts, {wrong or 'ok'}")
    return wrong


def main(seed: int) -> int:
    torch.set_num_threads(1)
    interpreted.as_processors_do()
    assert tiles.ENOUGH_PROGRAMS <= NUM_COUNTERS, "fewer counters than programs whose keys are split"
    found = [wrong for layer, num_keys in CASES for wrong in failures(layer, num_keys, torch.float32, seed)]
    found += failures(*CASES[0], torch.bfloat16, seed)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
