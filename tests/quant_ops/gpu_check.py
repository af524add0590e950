"""Checks and times the quantisation kernels on this machine's GPU: `python tests/quant_ops/gpu_check.py [SEED]`.

Every kernel against its contract, the quantisers' properties, inputs past 2^31 elements, CUDA graphs; then times.
Prints one line a check; exits 1 when one failed, 2 without a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import quant_properties as properties
import torch

from lockstep.core.capabilities import Capabilities
from lockstep.core.errors import ConfigError
from lockstep.ops.check import check_kernel
from lockstep.ops.contract import Kernel
from lockstep.ops.registry import contracts, kernels
from lockstep.platforms.registry import pick_platform

GROUP_OPS = ("per_token_group_quant_fp8", "per_token_group_quant_int8")
OPS = ("per_token_quant_fp8", *GROUP_OPS, "scaled_mm_fp8")
FP8 = torch.float8_e4m3fn


def kernels_here(op: str, device: Capabilities) -> list[Kernel]:
    def runs(kernel: Kernel) -> bool:
        has_features = all(device.has(feature) for feature in kernel.features)
        return has_features and (not kernel.platforms or device.platform in kernel.platforms)

    return [kernel for kernel in kernels(op) if runs(kernel)]


def check(name: str, run: Callable[[], str | None]) -> bool:
    """Prints the verdict of one check, which raises or says what is wrong."""
    try:
        wrong = run()
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    print(f"{'FAILED' if wrong else 'ok'}  {name}{': ' + wrong if wrong else ''}", flush=True)
    return not wrong


def meets_contract(kernel: Kernel, device: str, seed: int) -> str | None:
    report = check_kernel(contracts()[kernel.op], kernel, seed=seed, device=device)
    print(f"    {report.num_cases} cases, {len(report.refused)} refused, worst {report.worst_share:.3f}")
    return None if report.passed else "\n        ".join(report.failures[:10] or ("no case ran",))


def reaches_past_2_to_31(kernel: Kernel, device: str) -> str | None:
    """The last rows of a tensor of more than 2^31 elements, in either layout."""
    rows = 2**31 // 7168 + 700
    x = torch.zeros(rows, 7168, dtype=torch.bfloat16, device=device)
    x[-9:] = torch.randn(9, 7168, device=device)
    for column_major in (False, True):
        codes, scale = kernel.function(x, 128, column_major, False)
        wanted_codes, wanted_scale = contracts()[kernel.op].reference(x[-9:].cpu(), 128, False, False)
        if not torch.equal(codes[-9:].view(torch.uint8).cpu(), wanted_codes.view(torch.uint8)):
            return f"codes differ, {column_major=}"
        if not torch.equal(scale[-9:].cpu(), wanted_scale):
            return f"scales differ, {column_major=}"
    return None


def replays(kernel: Kernel, first: tuple[Any, ...], second: tuple[Any, ...]) -> str | None:
    """Captured with the first arguments, replayed with the second, as they give eagerly."""
    wanted = as_tuple(kernel.function(*second))
    static = tuple(value.clone() if isinstance(value, torch.Tensor) else value for value in first)
    kernel.function(*static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = as_tuple(kernel.function(*static))
    for held, value in zip(static, second, strict=True):
        if isinstance(held, torch.Tensor):
            held.copy_(value)
    graph.replay()
    same = all(torch.equal(as_bytes(a), as_bytes(b)) for a, b in zip(found, wanted, strict=True))
    return None if same else "the replay differs from the eager call"


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Its values bit by bit, whatever its dtype and strides."""
    return tensor.contiguous().view(torch.uint8)


def as_tuple(out: Any) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def matrices(rows: int, inputs: int, outputs: int, scaling: str, device: str) -> tuple[Any, ...]:
    """Arguments of scaled_mm_fp8 for a result in bfloat16."""
    a, b = (torch.randn(size, inputs, device=device).mul(64).to(FP8) for size in (rows, outputs))
    blocks = -(-inputs // 128)
    shapes = {"row": ((rows, 1), (outputs, 1)), "block": ((rows, blocks), (-(-outputs // 128), blocks))}[
        scaling
    ]
    return a, b, *(torch.rand(shape, device=device) for shape in shapes), None, torch.bfloat16


def median_us(run: Callable[[], Any]) -> float:
    """Microseconds of one call, the median of 30, each after the cache was overwritten."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        run()
    times = []
    for _ in range(30):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return sorted(times)[len(times) // 2]


def show_times(device: str, here: Capabilities) -> None:
    for rows, width in ((16, 7168), (512, 7168), (16384, 7168), (16384, 4096)):
        x = torch.randn(rows, width, device=device).bfloat16()
        calls: list[tuple[str, tuple[Any, ...], int]] = [("per_token_quant_fp8", (x,), width)]
        for op in GROUP_OPS:
            calls += [(op, (x, 128, column_major, False), 128) for column_major in (False, True)]
        for op, arguments, group in calls:
            num_bytes = rows * width * 3 + rows * width // group * 4
            for kernel in kernels_here(op, here):
                time_us = median_us(partial(kernel.function, *arguments))
                flags = " columns" if len(arguments) > 1 and arguments[2] else ""
                line = f"{op}{flags} {rows}x{width} {kernel.provider}"
                print(f"{line:64} {time_us:9.1f} us {num_bytes / time_us / 1e6:7.3f} TB/s", flush=True)
    for rows in (1, 64, 512, 4096):
        for scaling in ("row", "block"):
            arguments = matrices(rows, 7168, 4096, scaling, device)
            signature = {
                "dtype": torch.bfloat16, "inputs": 7168, "outputs": 4096, "scaling": scaling, "bias": False,
            }  # fmt: skip
            for kernel in kernels_here("scaled_mm_fp8", here):
                if kernel.provider not in ("triton", "cublas") or kernel.refuses(signature):
                    continue
                time_us = median_us(partial(kernel.function, *arguments))
                line = f"scaled_mm_fp8 per {scaling} {rows}x7168x4096 {kernel.provider}"
                codes_per_us = 4096 * 7168 / time_us
                rates = f"{codes_per_us / 1e6:7.3f} TB/s of b {2 * rows * codes_per_us / 1e6:7.1f} TFLOP/s"
                print(f"{line:64} {time_us:9.1f} us {rates}", flush=True)


def main(seed: int) -> int:
    try:
        platform = pick_platform("cuda")
    except ConfigError as error:
        print(error)
        return 2
    here, device = platform.capabilities(), "cuda"
    print(f"{here.device_name}, torch {torch.__version__}, seed {seed}")
    good = True
    for op in OPS:
        for kernel in kernels_here(op, here):
            good &= check(f"{op} {kernel.provider}", partial(meets_contract, kernel, device, seed))
    for op in GROUP_OPS:
        for kernel in kernels_here(op, here):
            run = partial(properties.check_all, kernel.function, device, seed)
            good &= check(f"{op} {kernel.provider} properties", run)
        triton = next(kernel for kernel in kernels_here(op, here) if kernel.provider == "triton")
        good &= check(f"{op} triton past 2^31", partial(reaches_past_2_to_31, triton, device))
        torch.cuda.empty_cache()
    for op in OPS:
        triton = next(kernel for kernel in kernels_here(op, here) if kernel.provider == "triton")
        if op == "scaled_mm_fp8":
            pair = [matrices(17, 512, 384, "block", device) for _ in range(2)]
        else:
            rest = () if op == "per_token_quant_fp8" else (128, True, True)
            pair = [(torch.randn(33, 1024, device=device).bfloat16(), *rest) for _ in range(2)]
        good &= check(f"{op} triton in a graph", partial(replays, triton, *pair))
    show_times(device, here)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
