"""Checks and times attention on this machine's GPU: `python tests/attention/gpu_check.py [SEED] [--sweep]`.

Every kernel against its contract, backends on mixed steps, replayed graphs against eager runs; then times. `--sweep`
times other launch sizes too. Prints one line a check; exits 1 when one failed, 2 without a GPU.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import partial

import torch
from backend_kernels import backend_kernel

from lockstep.attention.backend import AttentionSpec, Span
from lockstep.attention.choice import OPERATORS
from lockstep.attention.paged_backend import PagedBackend
from lockstep.attention.table_parts import DecodeTables, ExtendTables
from lockstep.core.errors import ConfigError
from lockstep.kv.pool.pool import LayerKV
from lockstep.ops.attention_extend import tiles
from lockstep.ops.attention_extend.cases import Layer, PagedInputs, paged_inputs
from lockstep.ops.check import check_kernel
from lockstep.ops.contract import Kernel
from lockstep.ops.registry import contracts, kernels
from lockstep.platforms.registry import pick_platform

DTYPE = torch.bfloat16
NUM_CALLS = 16


def kernel(op: str, provider: str) -> Kernel:
    return next(each for each in kernels(op) if each.provider == provider)


def made_on(device: str, seed: int, layer: Layer, rows: int, num_keys: tuple[int, ...]) -> PagedInputs:
    """Random inputs, drawn on the device itself: large pools take seconds on the host."""
    with torch.device(device):
        return paged_inputs(torch.Generator(device).manual_seed(seed), layer, DTYPE, rows, num_keys)


def triton_backend() -> PagedBackend:
    decode, extend = (kernel(op, "triton") for op in OPERATORS)
    return PagedBackend(DecodeTables(decode), ExtendTables(extend))


def meets_contract(tested: Kernel, device: str, seed: int) -> bool:
    report = check_kernel(contracts()[tested.op], tested, seed=seed, device=device)
    counts = f"{report.num_cases} cases, {len(report.refused)} refused"
    print(f"{'ok' if report.passed else 'FAILED'}  {tested.op} {tested.provider}: {counts}, ", end="")
    print(f"worst {report.worst_share:.3f} in {report.worst_case}", *report.failures[:8], sep="\n        ")
    return report.passed


def replays_give_eager_bits(
    device: str, backend: PagedBackend | None = None, layer: Layer | None = None
) -> bool:
    """One graph over a fixed plan, refilled: fewer sequences, other lengths, wider tables than eager has."""
    backend, layer = backend or triton_backend(), layer or Layer(32, 8, 128, 16, window=300, sinks=True)
    lengths = [(1, 700, 33, 2000), (16, 17), (2048, 1, 9, 64)]
    made = made_on(device, 0, layer, 4, (2048,) * 4)
    kv = LayerKV(made.k_KPSH, made.v_KPSH)
    spec = AttentionSpec(layer.scale, layer.window, 0.0, made.sinks_N)
    num_keys_T = torch.zeros(4, dtype=torch.int32, device=device)
    plan = backend.fixed_plan(num_keys_T, num_pages=500, page_size=layer.page_size)
    backend.run(plan, made.q_TNH, kv, spec)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = backend.run(plan, made.q_TNH, kv, spec)
    same = True
    for num_keys in lengths:
        tables = zip(num_keys, made.page_table_BP.tolist(), strict=False)
        spans = [Span(length - 1, 1, pages) for length, pages in tables]
        num_keys_T.copy_(torch.tensor([*num_keys, *[0] * (4 - len(num_keys))]))
        backend.refill(plan, spans)
        graph.replay()
        # Lengths of 0 stand for the rows that the graph has and the step has not.
        eager_plan = backend.fixed_plan(num_keys_T, num_pages=128, page_size=layer.page_size)
        backend.refill(eager_plan, spans)
        eager = backend.run(eager_plan, made.q_TNH, kv, spec)
        same &= torch.equal(eager, replayed) and not replayed[len(spans) :].any()
    print(f"{'ok' if same else 'FAILED'}  replayed graphs of {backend.name} give the eager bits, {layer}")
    return same


def seconds(calls: list[Callable[[], None]]) -> float:
    """Seconds of one call: the median of ten replays of a graph of all of them."""
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / len(calls))
    return sorted(times[2:])[5]


def decode_calls(layer: Layer, num_keys: tuple[int, ...], device: str) -> tuple[list[Callable[[], None]], int]:
    """Calls over pools that together exceed the cache, and the bytes of one."""
    num_bytes = 2 * sum(num_keys) * layer.kv_heads * layer.head_dim * DTYPE.itemsize
    calls = []
    for seed in range(max(2, min(NUM_CALLS, 2**28 // num_bytes))):
        made = made_on(device, seed, layer, len(num_keys), num_keys)
        arguments = (made.q_TNH, made.k_KPSH, made.v_KPSH, made.page_table_BP, made.num_keys_B)
        how = (layer.scale, layer.window, layer.soft_cap)
        calls.append(
            partial(kernel("attention_decode", "triton").function, *arguments, None, made.out_TNH, *how)
        )
    return list(itertools.islice(itertools.cycle(calls), NUM_CALLS)), num_bytes


def extend_call(layer: Layer, rows: int, num_keys: int, device: str) -> tuple[list[Callable[[], None]], int]:
    """A call, and its operations: two products over every key that a row sees."""
    made = made_on(device, 0, layer, rows, (num_keys,))
    cu_rows = torch.tensor([0, rows], dtype=torch.int32, device=device)
    arguments = (made.q_TNH, made.k_KPSH, made.v_KPSH, made.page_table_BP, cu_rows, made.num_keys_B)
    how = (layer.scale, layer.window, layer.soft_cap)
    call = partial(kernel("attention_extend", "triton").function, *arguments, None, made.out_TNH, *how)
    seen = sum(min(at, layer.window or at) for at in range(num_keys - rows + 1, num_keys + 1))
    return [call] * 2, 4 * layer.heads * layer.head_dim * seen


def show_times(device: str) -> None:
    for layer, num_keys in (
        (Layer(32, 8, 128, 16), (1024,) * 64),
        (Layer(32, 8, 128, 64), (1024,) * 64),
        (Layer(32, 8, 128, 1), (1024,) * 64),
        (Layer(32, 8, 128, 16), (1024,) * 256),
        (Layer(32, 8, 128, 16), tuple(range(64, 2048, 31))),
        (Layer(32, 32, 128, 16), (1024,) * 32),
        (Layer(16, 8, 128, 16), (1024,) * 64),
        (Layer(32, 4, 128, 16), (1024,) * 64),
        (Layer(32, 8, 128, 16), (8192,) * 8),
        (Layer(32, 8, 128, 16), (1024,)),
        (Layer(32, 8, 128, 16), (32768,)),
    ):
        calls, num_bytes = decode_calls(layer, num_keys, device)
        took = seconds(calls)
        what = f"decode {layer}, {len(num_keys)} of {sum(num_keys) // len(num_keys)} keys"
        print(f"{what:64} {took * 1e6:9.1f} us {num_bytes / took / 1e12:7.3f} TB/s", flush=True)
    for layer, rows, length in (
        (Layer(32, 8, 128, 16), 8192, 8192),
        (Layer(32, 8, 128, 64), 8192, 8192),
        (Layer(32, 8, 128, 16), 2048, 2048),
        (Layer(32, 8, 128, 16), 512, 8192),
        (Layer(32, 32, 128, 16), 4096, 4096),
        (Layer(16, 8, 64, 16), 8192, 8192),
        (Layer(8, 4, 256, 16), 8192, 8192),
        (Layer(32, 8, 128, 16, window=1024), 8192, 8192),
    ):
        made_calls, num_flops = extend_call(layer, rows, length, device)
        took = seconds(made_calls)
        what = f"extend {layer}, {rows} rows of {length} keys"
        print(f"{what:64} {took * 1e6:9.1f} us {num_flops / took / 1e12:7.1f} TFLOP/s", flush=True)


def sweep(device: str) -> None:
    """Other launch sizes for the two calls that matter most, and for one long sequence."""
    from lockstep.ops.attention_decode import programs as decode
    from lockstep.ops.attention_extend import programs as extend

    layer = Layer(32, 8, 128, 16)
    for num_keys in ((1024,) * 64, (1024,)):
        calls, num_bytes = decode_calls(layer, num_keys, device)
        for programs, keys, warps, stages in itertools.product(
            (512, 1024, 2048), (32, 64, 128), (2, 4, 8), (2, 3, 4)
        ):
            tiles.ENOUGH_PROGRAMS = programs
            tile = tiles.Tile(16, keys, warps, stages)
            decode.decode_tile = lambda *sizes, tile=tile: tile
            show_tile(f"decode {len(num_keys)} {programs} programs {tile}", calls, num_bytes / 1e12)
    calls, num_flops = extend_call(layer, 8192, 8192, device)
    for rows, keys, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        tile = tiles.Tile(rows, keys, warps, stages)
        extend.extend_tile = lambda *sizes, tile=tile: tile
        show_tile(f"extend {tile}", calls, num_flops / 1e12)


def show_tile(what: str, calls: list[Callable[[], None]], work: float) -> None:
    try:
        took = seconds(calls)
    except Exception as error:
        print(f"{what}: {type(error).__name__}", flush=True)
        return
    print(f"{what:90} {took * 1e6:9.1f} us {work / took:8.2f} T/s", flush=True)


def main(arguments: list[str]) -> int:
    try:
        platform = pick_platform("cuda")
    except ConfigError as error:
        print(error)
        return 2
    seed = int(next((text for text in arguments if text.isdigit()), 0))
    device = str(platform.device().type)
    print(f"{platform.capabilities().device_name}, torch {torch.__version__}, seed {seed}")
    tested = [kernel(op, provider) for op in OPERATORS for provider in ("triton", "torch")]
    tested.append(backend_kernel(triton_backend(), kernel("attention_extend", "triton")))
    good = all([meets_contract(each, device, seed) for each in tested])
    good &= replays_give_eager_bits(device)
    show_times(device)
    if "--sweep" in arguments:
        sweep(device)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
