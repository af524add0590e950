"""What is compiled in the background: all that calls will want, each once, and nothing that stops an engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hopper_card import hopper
from tiny_llm import make_tiny, open_tiny

from lockstep.executor.runner import ModelRunner
from lockstep.ops.background import BackgroundCompiler
from lockstep.ops.contract import Kernel, Signature
from lockstep.ops.registry import kernels
from lockstep.ops.selection import KernelSelector

pytestmark = pytest.mark.suite("cpu")

CPU = torch.device("cpu")
H100 = hopper("sm_90", "triton", "cuda_bindings")


def wait() -> None:
    for thread in threading.enumerate():
        if thread.name == "compiler":
            thread.join(20)
            assert not thread.is_alive()


def kernel_of(*works: Callable[[], object], asked: list[object] | None = None) -> Kernel:
    def compile_later(
        signature: Signature, folder: Path, device: torch.device
    ) -> Iterator[Callable[[], object]]:
        if asked is not None:
            asked.append((signature, folder, device))
        yield from works

    return Kernel("linear", "made up", len, compile_later=compile_later)


def test_each_program_once_and_failures_stop_nothing(tmp_path: Path) -> None:
    done: list[str] = []
    asked: list[object] = []

    def fail() -> None:
        done.append("failed")
        raise RuntimeError("no")

    works = [fail, *[lambda number=number: done.append(str(number)) for number in range(50)], fail]
    compiler = BackgroundCompiler(CPU, tmp_path)
    kernel = kernel_of(*works, asked=asked)
    for inputs in (8, 8, 16):
        compiler.add(kernel, {"inputs": inputs})
    compiler.add(Kernel("linear", "plain", len), {"inputs": 8})
    wait()
    assert asked == [({"inputs": 8}, tmp_path, CPU), ({"inputs": 16}, tmp_path, CPU)]
    assert sorted(done) == sorted(2 * ["failed", *map(str, range(50)), "failed"])
    compiler.add(kernel, {"inputs": 32})
    wait()
    assert len(done) == 3 * 52, "the threads have ended, and begin again"


def test_what_delays_an_engine_waits_until_it_has_started(tmp_path: Path) -> None:
    """One after the other, by one thread; each signature once."""
    done: list[tuple[int, str]] = []

    def compile_idle(signature: Signature, device: torch.device) -> Iterator[Callable[[], object]]:
        for number in range(3):
            yield lambda number=number: done.append((number, threading.current_thread().name))

    compiler = BackgroundCompiler(CPU, tmp_path)
    for inputs in (8, 8, 16):
        compiler.add(Kernel("linear", "made up", len, compile_idle=compile_idle), {"inputs": inputs})
    wait()
    assert done == []
    compiler.started()
    wait()
    assert done == [(number, "compiler") for number in (0, 1, 2, 0, 1, 2)]
    compiler.started()
    wait()
    assert len(done) == 6


def test_an_engine_says_when_it_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    submit = ModelRunner.submit
    monkeypatch.setattr(BackgroundCompiler, "started", lambda self: steps.append("started"))
    monkeypatch.setattr(ModelRunner, "submit", lambda self, plan: (steps.append("step"), submit(self, plan))[1])
    make_tiny(tmp_path)
    with open_tiny(tmp_path, device="cpu"):
        assert steps.count("started") == 1 and steps[-1] == "started" and len(steps) > 1


def test_the_engine_does_not_wait(tmp_path: Path) -> None:
    goes_on = threading.Event()
    compiler = BackgroundCompiler(CPU, tmp_path)
    begin_s = time.monotonic()
    compiler.add(kernel_of(lambda: goes_on.wait(20)), {})
    assert time.monotonic() - begin_s < 1
    goes_on.set()
    wait()


@pytest.mark.parametrize("how", ["compile_later", "compile_idle"])
def test_a_process_that_ends_begins_nothing_more(how: str) -> None:
    import subprocess
    import sys

    code = (
        "import time, torch; from pathlib import Path\n"
        "from lockstep.ops.background import BackgroundCompiler; from lockstep.ops.contract import Kernel\n"
        "later = lambda *given: [lambda: time.sleep(0.5)] * 1000\n"
        "compiler = BackgroundCompiler(torch.device('cpu'), Path())\n"
        f"compiler.add(Kernel('a', 'b', len, {how}=later), {{}}); compiler.started()\n"
        "time.sleep(0.1); print(time.time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    assert time.time() - float(done.stdout) < 5


def test_bound_kernels_are_compiled_and_parts_are_not(tmp_path: Path) -> None:
    class Noting(BackgroundCompiler):
        def add(self, kernel: Kernel, signature: Signature) -> None:
            added.append((kernel.op, kernel.provider, signature["inputs"]))

    added: list[tuple[str, str, int]] = []
    selector = KernelSelector(H100, ("cuda", "triton"), measured_in=tmp_path, background=Noting(CPU, tmp_path))
    plain = {"dtype": torch.bfloat16, "inputs": 64, "outputs": 64, "bias": False}
    fused = plain | {"weight_dtype": torch.bfloat16, "gated": False, "adds": True}
    selector.bind("linear", "here", plain)
    selector.bind_fused("add_norm_linear", "there", fused)
    assert selector.bind_fused("add_norm_linear", "apart", fused, apart="for a reason") is None
    assert added == [("linear", "cuda", 64), ("add_norm_linear", "cuda", 64)]


pytest.importorskip("cuda.bindings.nvrtc", reason="NVIDIA's bindings are not here")


def test_who_wants_what_is_being_compiled_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lockstep.ops import cuda_program

    compiled: list[bytes] = []

    def slowly(source: bytes, architecture: str) -> bytes:
        compiled.append(source)
        time.sleep(0.2)
        return b"code of " + source

    monkeypatch.setattr(cuda_program, "_compiled", slowly)
    found: list[bytes] = []
    threads = [
        threading.Thread(
            target=lambda text=text: found.append(cuda_program.machine_code(text, "sm_90a", tmp_path))
        )
        for text in 4 * ["one", "other"]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(compiled) == [b"one", b"other"]
    assert sorted(found) == 4 * [b"code of one"] + 4 * [b"code of other"]


def programs_of(op: str, signature: Signature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that the CUDA kernel of an operator has compiled for a signature."""
    import importlib

    (kernel,) = (each for each in kernels(op) if each.provider == "cuda")
    assert kernel.refuses(signature) is None and kernel.compile_later is not None
    room = {"add_norm_linear": "linear", "linear_choose_greedy": "linear"}.get(op, op)
    module = importlib.import_module(f"lockstep.ops.{room}.{'hopper_down' if op == 'fused_moe' else 'hopper'}")
    sources: list[str] = []

    def note(source: str, architecture: str, folder: Path) -> None:
        assert (architecture, folder) == ("sm_90a", tmp_path)
        sources.append(source)

    monkeypatch.setattr(module, "machine_code", note)
    monkeypatch.setattr(module, "architecture_of", lambda device: "sm_90a")
    for work in kernel.compile_later(signature, tmp_path, CPU):
        work()
    assert len(set(sources)) == len(sources) > 0
    return sources


@pytest.mark.parametrize("outputs, inputs, gated", [(6144, 4096, False), (24576, 4096, True), (96, 64, False)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_every_number_of_rows(
    outputs: int, inputs: int, gated: bool, bias: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lockstep.ops.linear.hopper import source
    from lockstep.ops.linear.hopper_blocks import MOST_ROWS, block_of

    signature = {"dtype": torch.bfloat16, "inputs": inputs, "outputs": outputs, "bias": bias}
    found = programs_of("linear", signature, tmp_path, monkeypatch) if not gated else []
    fused = signature | {"weight_dtype": torch.bfloat16, "gated": gated, "adds": True}
    found_fused = programs_of("add_norm_linear", fused, tmp_path, monkeypatch)
    blocks = {block_of(rows, outputs, inputs, gated=gated) for rows in range(1, MOST_ROWS + 1)} - {None}
    wanted = {source(block, torch.bfloat16, gated=gated, has_bias=bias) for block in blocks if block}
    assert set(found_fused) == wanted and (gated or set(found) == wanted)
    largest = block_of(MOST_ROWS, outputs, inputs, gated=gated)
    if largest is not None:
        assert found_fused[0] == source(largest, torch.bfloat16, gated=gated, has_bias=bias)


def test_the_best_of_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lockstep.ops.linear.hopper import finds_best, source
    from lockstep.ops.linear.hopper_blocks import MOST_ROWS, block_of

    signature = {"dtype": torch.bfloat16, "inputs": 1024, "outputs": 151936}
    found = programs_of("linear_choose_greedy", signature, tmp_path, monkeypatch)
    blocks = {rows: block_of(rows, 151936, 1024, gated=False) for rows in range(1, MOST_ROWS + 1)}
    wanted = {
        source(block, torch.bfloat16, best=True)
        for rows, block in blocks.items()
        if block is not None and finds_best(block, rows)
    }
    assert wanted and wanted <= set(found)


def test_attention_of_every_number_of_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lockstep.ops.norm_rope_attention_decode.hopper import Heads, source
    from lockstep.ops.norm_rope_attention_decode.hopper_blocks import block_of

    plain = {
        "window": 0,
        "soft_cap": 0.0,
        "sinks": False,
        "dtype": torch.bfloat16,
        "pool_dtype": torch.bfloat16,
    }
    for norms in (torch.bfloat16, None):
        sizes = {"heads": 16, "kv_heads": 8, "head_dim": 128, "page_size": 16, "weight_dtype": norms}
        found = programs_of("norm_rope_attention_decode", plain | sizes, tmp_path, monkeypatch)
        heads = Heads(2, 128, 16, norms is not None, torch.bfloat16)
        assert set(found) == {source(block_of(count), heads) for count in range(1, 3000)}


def test_the_experts_second_product_of_every_number_of_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lockstep.ops.fused_moe.hopper_down import source
    from lockstep.ops.fused_moe.hopper_down_blocks import DownShape, block_of

    signature = {"dtype": torch.bfloat16, "experts": 128, "top_k": 8, "width": 2048, "inner": 768}
    found = programs_of("fused_moe", signature, tmp_path, monkeypatch)
    shape = DownShape(8, 2048, 768)
    blocks = {block_of(count, shape) for count in range(1, 300)}
    assert set(found) == {source(block, shape, torch.bfloat16) for block in blocks if block is not None}


def test_whole_decoders_of_every_number_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from lockstep.ops.decoder_decode import hopper
    from lockstep.ops.decoder_decode.hopper_shape import DecoderShape, grid_of, rows_served

    monkeypatch.setattr(hopper, "_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    sizes = {"hidden_size": 1024, "inner_size": 3072, "heads": 16, "kv_heads": 8, "head_dim": 128}
    signature = {"dtype": torch.bfloat16, "pool_dtype": torch.bfloat16, "activation": "silu", "plain": True}
    signature |= sizes | {"page_size": 16, "blocks": 28, "num_ranks": 1}
    for norms, bias in ((True, False), (False, True)):
        given = signature | {"head_norms": norms, "qkv_bias": bias}
        found = programs_of("decoder_decode", given, tmp_path, monkeypatch)
        shape = DecoderShape(1024, 3072, 8, 2, 128, 28, 16, norms, bias)
        grids = {grid_of(shape, rows, 132) for rows in range(1, rows_served(shape, 132) + 1)}
        assert set(found) == {hopper.source(shape, grid) for grid in grids if grid is not None}
