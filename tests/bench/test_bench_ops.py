"""`lockstep ops bench`: what is timed, against what, and what is said of the rest."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lockstep.bench import ops, ops_measure, ops_plot, ops_timing
from lockstep.bench.figures import Spread
from lockstep.bench.ops_limits import MachineLimits, measure_limits
from lockstep.bench.ops_measure import Measurement, Measurements, measure, providers_of, workload_of
from lockstep.bench.ops_page import markdown
from lockstep.bench.ops_timing import Timing, time_calls
from lockstep.core.capabilities import Capabilities
from lockstep.core.errors import ConfigError, KernelError
from lockstep.ops.check import outcome
from lockstep.ops.contract import Contract, Kernel
from lockstep.ops.registry import contracts, kernels
from lockstep.platforms.cpu import CpuPlatform

pytestmark = pytest.mark.suite("cpu")

Streams = pytest.CaptureFixture[str]
CPU = CpuPlatform()
NORM, WORKLOAD = workload_of("rms_norm")
TIMED = [contract for contract in contracts().values() if contract.workload is not None]
INSTANT = Timing(Spread(1e-3, 1e-3, 1e-3), 1, 1, "not at all")


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes a millisecond."""
    monkeypatch.setattr(ops_measure, "time_calls", lambda *given, **how: INSTANT)


# -- workloads


@pytest.mark.parametrize("contract", TIMED, ids=lambda contract: contract.name)
def test_a_workload_describes_calls_of_its_operator(contract: Contract) -> None:
    assert contract.workload is not None
    sizes = contract.workload.sizes
    assert list(sizes) == sorted(set(sizes)) and len(sizes) >= 4 and contract.workload.axis
    for size in sizes:
        assert set(contract.workload.case(size).signature) == set(contract.signature)


@pytest.mark.parametrize(
    "contract",
    [each for each in TIMED if each.workload and not each.workload.num_flops],
    ids=lambda each: each.name,
)
@pytest.mark.usefixtures("untimed")
def test_every_kernel_that_runs_here_is_right_on_its_workload(contract: Contract) -> None:
    assert contract.workload is not None
    found = measure(contract, contract.workload, kernels(contract.name), CPU, (1, 33), seed=7)
    assert {(each.provider, each.size) for each in found.done} >= {("reference", 1), ("reference", 33)}
    assert found.wrong == {}
    few, many = (each.num_bytes for each in found.done if each.provider == "reference")
    assert few < many


def test_the_hot_operators_are_timed() -> None:
    wanted = {"moe_topk_softmax", "moe_topk_sigmoid", "rms_norm", "silu_and_mul", "per_token_group_quant_fp8"}
    assert wanted <= {contract.name for contract in TIMED}


def test_bytes_are_those_that_must_move() -> None:
    """Counted by hand."""
    assert bytes_of("rms_norm", 5) == 2 * (5 * 4096 * 2) + 4096 * 2
    assert bytes_of("silu_and_mul", 3) == 3 * 3 * 8192 * 2
    assert bytes_of("add_rms_norm", 5) == 4 * (5 * 4096 * 2) + 4096 * 2
    assert bytes_of("per_token_group_quant_fp8", 8) == 8 * 4096 * (2 + 1) + 8 * 32 * 4
    assert bytes_of("moe_topk_softmax", 10) == 10 * (128 + 8 + 8) * 4
    assert bytes_of("kv_store", 4) == 2 * 2 * 4 * 8 * 128 * 2 + 4 * 8


def bytes_of(op: str, size: int) -> int:
    contract, workload = workload_of(op)
    arguments = list(workload.case(size).make(torch.Generator().manual_seed(0)))
    results = [value for _, value in outcome(contract, contract.reference, arguments)]
    return workload.bytes_moved(arguments, results)


def test_operations_are_those_that_torch_counts() -> None:
    """On shapes alone, against plain products of the same sizes."""
    x, weight = torch.empty(16, 256, device="meta"), torch.empty(512, 256, device="meta")
    assert flops_of("linear", x, weight, None) == counted(lambda: x @ weight.T)

    experts, pairs, inner = 4, 16 * 2, 96
    gate_up = torch.empty(experts, 2 * inner, 256, device="meta")
    down = torch.empty(experts, 256, inner, device="meta")
    ids = torch.empty(16, 2, dtype=torch.int32, device="meta")
    hidden, half = torch.empty(pairs, 256, device="meta"), torch.empty(pairs, inner, device="meta")
    both = counted(lambda: (hidden @ gate_up[0].T, half @ down[0].T))
    assert flops_of("fused_moe", x, gate_up, down, ids.float(), ids) == both
    assert flops_of("grouped_gemm", x, gate_up, None, None, None, None, 2) == counted(
        lambda: hidden @ gate_up[0].T
    )

    q = torch.empty(1, 8, 64, 32, device="meta")
    whole = counted(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    causal = flops_of("attention_extend", q[0].transpose(0, 1))
    assert causal == whole * 65 / 128, "half of the square of 64 keys, and the diagonal"


def flops_of(op: str, *arguments: Any) -> int:
    return workload_of(op)[1].flops(arguments)


def counted(products: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        products()
    return int(counter.get_total_flops())


# -- time


@pytest.mark.suite("cpu", exclusive=True)
def test_a_call_takes_what_it_takes() -> None:
    timing = time_calls(CPU, lambda: lambda: time.sleep(0.004), 2**30)
    print(timing)
    assert 0.004 <= timing.seconds.min <= timing.seconds.median < 0.02
    assert (timing.num_calls, timing.method) == (2, "one after the other, host clock")


def test_small_calls_get_arguments_of_their_own_and_slow_ones_few() -> None:
    made: list[int] = []

    def new_call() -> Callable[[], Any]:
        made.append(len(made))
        return lambda: None

    assert time_calls(CPU, new_call, 1).num_calls == 128 == len(made)
    assert time_calls(CPU, new_call, 2**25).num_calls == 4
    assert time_calls(CPU, lambda: lambda: time.sleep(0.3), 2**20).num_calls <= 2


class GraphPlatform(CpuPlatform):
    """Has graphs that record a list of calls; `forbids` are calls that break a capture."""

    name = "graphs"

    def __init__(self, *, forbids: bool = False) -> None:
        self.forbids = forbids
        self.capturing = False
        self.num_replays = 0

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), has_graphs=True)

    def new_graph(self, beside: Any = None) -> Any:
        return self

    @contextmanager
    def capture(self) -> Iterator[None]:
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    def replay(self) -> None:
        self.num_replays += 1
        time.sleep(0.002)


def test_graphs_are_replayed_and_what_they_cannot_hold_is_not() -> None:
    platform = GraphPlatform()
    timing = time_calls(platform, lambda: lambda: None, 2**24)
    assert timing.method.startswith("one graph") and platform.num_replays == timing.num_repeats + 2
    assert timing.seconds.median == pytest.approx(0.002 / timing.num_calls, rel=0.5)

    asking = GraphPlatform()
    timing = time_calls(asking, lambda: lambda: None, 2**24, asks_host=True)
    assert timing.method.startswith("one after the other") and asking.num_replays == 0

    refusing = GraphPlatform()

    def synchronises() -> None:
        if refusing.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    timing = time_calls(refusing, lambda: synchronises, 2**24)
    assert timing.method.startswith("one after the other") and refusing.num_replays == 0


def test_events_are_the_clock_of_devices_with_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    class QueuePlatform(CpuPlatform):
        name = "queues"

        def capabilities(self) -> Capabilities:
            return replace(super().capabilities(), has_streams=True)

    class Event:
        def __init__(self, *, device: torch.device, enable_timing: bool) -> None:
            assert device == torch.device("cpu") and enable_timing
            self.at = -1

        def record(self) -> None:
            self.at = len(submitted)

        def elapsed_time(self, end: Event) -> float:
            return float(end.at - self.at)

    submitted: list[int] = []
    monkeypatch.setattr(torch, "Event", Event)
    timing = time_calls(QueuePlatform(), lambda: lambda: submitted.append(1), 2**28)
    assert timing.method == "one after the other, device events"
    assert timing.seconds.median == pytest.approx(1e-3), "a millisecond of that clock for each call"
    assert timing.num_calls == 4


# -- limits


def test_limits_are_measured_and_the_slower_one_counts() -> None:
    limits = MachineLimits(
        bandwidths={"a copy": 60.0, "reading": 100.0}, flops_per_s=1000.0, matmul="a product"
    )
    assert limits.bandwidth_from == "reading" and limits.bytes_per_s == 100.0
    assert limits.shortest_s(num_bytes=200, num_flops=0) == 2.0
    assert limits.shortest_s(num_bytes=200, num_flops=5000) == 5.0
    assert MachineLimits(bandwidths={"a copy": 100.0}).shortest_s(num_bytes=200, num_flops=5000) == 2.0


def test_streams_are_their_bytes_over_their_time_and_the_best_is_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lockstep.bench import ops_limits

    def timed(platform: Any, new_call: Callable[[], Callable[[], Any]], num_bytes: int, **how: Any) -> Timing:
        sizes.append((new_call()().nbytes, num_bytes))
        return INSTANT

    sizes: list[tuple[int, int]] = []
    monkeypatch.setattr(ops_limits, "time_calls", timed)
    limits = measure_limits(CPU, flops_dtype=torch.float32)
    copied, negated, found, product = sizes
    assert copied == negated == (copied[0], 2 * copied[0]) and found == (4, copied[0]), (
        "read once, nothing written"
    )
    assert limits.bandwidths == {
        name: pytest.approx(moved / 1e-3)
        for name, (_, moved) in zip(("a copy", "a negation", "reading alone"), sizes, strict=False)
    }
    assert limits.flops_per_s == pytest.approx(2 * 1024**3 / 1e-3) and product[0] == 1024**2 * 4
    assert measure_limits(CPU, flops_dtype=None).flops_per_s is None
    monkeypatch.setitem(ops_limits.DATASHEET_BYTES_PER_S, CPU.capabilities().device_name, 1e15)
    known = measure_limits(CPU, flops_dtype=None)
    assert known.bandwidth_from == "the datasheet" and known.bytes_per_s == 1e15
    assert "a copy reaches" in known.lines()[0]


def test_a_cache_explains_only_what_fits_it() -> None:
    """Two calls of ten bytes each that take a tenth of the time that the limit allows."""
    fast = Measurement(7, "mine", Timing(Spread(0.01, 0.01, 0.01), 2, 1, "not at all"), 10, 0, 0.0)
    for cache_bytes, is_cached in ((20, True), (19, False), (None, False)):
        limits = MachineLimits(bandwidths={"a copy": 100.0}, cache_bytes=cache_bytes)
        assert fast.share_of(limits) == 10 and fast.as_json(limits)["fits_cache"] is is_cached
        said = " ".join(ops._notes(Measurements([fast]), limits))
        assert ("fit the cache: mine at 7" in said) is is_cached
        assert ("measured to be the limit: mine at 7" in said) is not is_cached


# -- measuring


def kernel(provider: str, function: Callable[..., Any], **fields: Any) -> Kernel:
    return Kernel(op="rms_norm", provider=provider, function=function, **fields)


def exact(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rms_norm(x.double(), x.shape[-1:], weight.double(), eps).to(x.dtype)


def measured(*offered: Kernel, contract: Contract = NORM) -> Measurements:
    assert contract.workload is not None
    return measure(contract, contract.workload, offered, CPU, (2, 3), seed=1)


@pytest.mark.usefixtures("untimed")
def test_a_wrong_provider_is_not_timed() -> None:
    def wrong_at_three(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out = exact(x, weight, eps)
        return out * 1.02 if len(x) == 3 else out

    def raises(*arguments: Any) -> None:
        raise ValueError("not like this\nat all")

    found = measured(
        kernel("wrong", wrong_at_three),
        kernel("broken", raises),
        kernel("wide", lambda *arguments: exact(*arguments).double()),
        kernel("right", exact),
    )
    assert [(each.provider, each.size) for each in found.done] == [("wrong", 2), ("right", 2), ("right", 3)]
    assert set(found.wrong) == {"wrong at 3", "broken at 2", "broken at 3", "wide at 2", "wide at 3"}
    assert "tolerances from the reference" in found.wrong["wrong at 3"]
    assert found.wrong["broken at 2"] == "ValueError: not like this"
    assert all(each.error_share <= 2 for each in found.done)


@pytest.mark.usefixtures("untimed")
def test_what_cannot_run_says_why() -> None:
    found = measured(
        kernel("elsewhere", exact, platforms=frozenset({"there"})),
        kernel("winged", exact, features=frozenset({"wings"})),
        kernel("picky", exact, refuses=lambda signature: "never today"),
    )
    assert found.done == [] and found.wrong == {}
    assert found.not_run == {
        "elsewhere": "made for there, not cpu",
        "winged": "the device lacks wings",
        "picky at 2": "never today",
        "picky at 3": "never today",
    }


@pytest.mark.usefixtures("untimed")
def test_a_compiler_that_is_missing_is_no_fault_of_the_operator() -> None:
    def no_compiler(*arguments: Any) -> None:
        raise RuntimeError("no C++ compiler found")

    found = measured(kernel(ops_measure.COMPILED, no_compiler))
    assert found.wrong == {} and found.not_run["torch_compile at 2"] == "RuntimeError: no C++ compiler found"


def test_calls_own_their_arguments_with_weights_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that spoils its input, on a weight in a form of its own, is right at every call."""
    spoiled: list[int] = []

    def spoils(x: torch.Tensor, prepared: dict[str, torch.Tensor], bias: None) -> torch.Tensor:
        assert not bool(x.isnan().any())
        out = (x.double() @ prepared["IO"].double()).to(x.dtype)
        spoiled.append(x.data_ptr())
        x.fill_(torch.nan)
        return out

    def timed(platform: Any, new_call: Callable[[], Callable[[], Any]], num_bytes: int, **how: Any) -> Timing:
        for call in [new_call() for _ in range(3)]:
            call()
        return INSTANT

    monkeypatch.setattr(ops_measure, "time_calls", timed)
    contract, workload = workload_of("linear")
    mine = Kernel(op="linear", provider="mine", function=spoils, prepare=lambda weight: {"IO": weight.T})
    found = measure(contract, workload, (mine,), CPU, (2,), seed=1)
    assert found.wrong == {} and len(found.done) == 1 and len(spoiled) == 4


def test_providers_are_the_kernels_and_the_compiled_reference() -> None:
    names = [kernel.provider for kernel in providers_of(NORM, None)]
    assert names == [*(kernel.provider for kernel in kernels("rms_norm")), "torch_compile"]
    assert [each.provider for each in providers_of(NORM, ("torch_compile", "torch", "torch"))] == [
        "torch_compile",
        "torch",
    ]
    with pytest.raises(KernelError, match=r"'rms_norm' has no provider 'tritn'; did you mean 'triton'\?"):
        providers_of(NORM, ("torch", "tritn"))


def test_operators_without_a_workload_and_unknown_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError, match=r"unknown operator 'rms_nrom'; did you mean 'rms_norm'\?"):
        workload_of("rms_nrom")
    monkeypatch.setattr(ops_measure, "contracts", lambda: {"rms_norm": replace(NORM, workload=None)})
    with pytest.raises(KernelError, match="'rms_norm' states no workload"):
        workload_of("rms_norm")


# -- the command


def run(tmp_path: Path, **options: Any) -> tuple[int, dict[str, Any]]:
    given = {"providers": ("reference", "torch", "triton"), "platform": "cpu", "sizes": (1, 4), "seed": 0}
    out = tmp_path / "out.json"
    code = ops.main("rms_norm", **{**given, "json_out": out, "plot_out": tmp_path / "out.png", **options})
    return code, json.loads(out.read_text())


def test_table_json_and_plot(tmp_path: Path, capsys: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(ops_timing, "_REPEATS_S", 0.01)
    code, report = run(tmp_path)
    assert code == 0
    out = capsys.readouterr().out
    assert "not run: triton: made for cuda, musa, rocm, not cpu" in out
    assert "GB/s of " in out and "; measured here" in out and "one after the other, host clock" in out
    results = report["results"]
    assert [(each["size"], each["provider"]) for each in results["measurements"]] == [
        (1, "reference"),
        (1, "torch"),
        (4, "reference"),
        (4, "torch"),
    ]
    for each in results["measurements"]:
        assert each["bytes_per_s"] == pytest.approx(each["bytes"] / each["seconds"]["median"])
        assert each["share_of_limit"] == pytest.approx(each["bytes_per_s"] / results["limits"]["bytes_per_s"])
    assert results["not_run"] == {"triton": "made for cuda, musa, rocm, not cpu"}
    assert report["machine"]["devices"] and report["workload"]["platform"] == "cpu"
    page = markdown(report, picture="out.png")
    assert page.startswith("## rms_norm\n") and "![rms_norm over its sizes](out.png)" in page
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][2:]
    assert [(row[0].strip("| "), row[1]) for row in rows] == [
        (str(each["size"]), each["provider"]) for each in results["measurements"]
    ]
    assert "- not run: triton: made for cuda, musa, rocm, not cpu" in page
    picture = (tmp_path / "out.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 10_000


@pytest.mark.usefixtures("untimed")
def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Streams) -> None:
    code, _ = run(tmp_path, providers=("triton",), plot_out=None)
    assert code == 1, "nothing was timed"
    wrong = kernel("wrong", lambda *arguments: exact(*arguments) * 1.1)
    monkeypatch.setattr(ops, "providers_of", lambda contract, names: [kernel("right", exact), wrong])
    code, report = run(tmp_path, plot_out=None)
    assert code == 1 and set(report["results"]["wrong"]) == {"wrong at 1", "wrong at 4"}
    assert "WRONG, not timed: wrong at 1" in capsys.readouterr().out
    monkeypatch.setattr(ops, "providers_of", lambda contract, names: [kernel("right", exact)])
    assert run(tmp_path, plot_out=None)[0] == 0


def test_the_legend_names_who_did_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **options: drawn.append(self))
    measured_one = {"provider": "torch", "size": 4, "bytes_per_s": 1e9}
    limits = {"flops_per_s": None, "bytes_per_s": 2e9, "bytes_per_s_from": "reading alone"}
    results = {"op": "rms_norm", "axis": "rows", "limits": limits, "measurements": [measured_one]}
    results |= {"not_run": {"aiter": "made for rocm", "torch at 8": "never"}, "wrong": {"mine at 4": "off"}}
    ops_plot.draw({"results": results, "workload": {"device": "a test"}}, tmp_path / "out.png")
    labels = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert labels == ["torch", "aiter: not run", "mine: wrong", "limit, reading alone: 2"]


def test_no_plot_without_the_package_or_without_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = {"results": {"op": "rms_norm", "measurements": []}}
    with pytest.raises(ConfigError, match="nothing to draw"):
        ops_plot.draw(nothing, tmp_path / "none.png")
    monkeypatch.setattr(ops_plot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--plot needs matplotlib; run: pip install"):
        run(tmp_path)
    assert not (tmp_path / "out.json").exists(), "said before anything is measured"
