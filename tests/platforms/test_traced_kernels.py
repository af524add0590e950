"""Kernels as operators of torch.library: the same kernels and the same bits, compiled or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from lockstep.core.errors import KernelError
from lockstep.layers.build import Build
from lockstep.layers.linear import Product
from lockstep.layers.norm import AddRMSNorm, RMSNorm
from lockstep.models.loading.sources import RandomWeights
from lockstep.ops import library
from lockstep.ops.contract import Argument, Case, Contract, Kernel
from lockstep.ops.library import HeldWeights, TraceableSelector, kernels_called, traceable, traced
from lockstep.ops.nested import with_tensors
from lockstep.ops.registry import contracts, kernels
from lockstep.ops.selection import KernelSelector
from lockstep.parallel.mesh import Mesh
from lockstep.platforms.registry import load_platform

pytestmark = pytest.mark.suite("cpu")

DEVICES = ("cpu", "sim")
NUM_CASES = 2
# A whole decoder is one call already; its reference looks at values, so that no fake can be made of it.
EXPRESSIBLE = sorted(set(contracts()) - {"decoder_decode", "decoder_forward"})


def usable_kernels(op: str, platform: str) -> list[Kernel]:
    preference = load_platform(platform).kernel_preference
    found = [kernel for kernel in kernels(op) if kernel.provider in preference]
    return [kernel for kernel in found if not kernel.platforms or platform in kernel.platforms]


def accepted_cases(contract: Contract, kernel: Kernel) -> list[Case]:
    return list(
        islice((case for case in contract.cases() if kernel.refuses(case.signature) is None), NUM_CASES)
    )


def placed(values: Sequence[Any], device: torch.device) -> list[Any]:
    return [with_tensors(value, lambda each: each.to(device)) for value in values]


def made(case: Case, device: torch.device) -> list[Any]:
    return placed(case.make(torch.Generator().manual_seed(3)), device)


def prepared(contract: Contract, kernel: Kernel, values: list[Any]) -> list[Any]:
    """The arguments as the kernel reads them."""
    pairs = zip(contract.arguments, values, strict=False)
    ready = kernel.prepare
    return [ready(value) if argument.constant and ready else value for argument, value in pairs]


def has_float8(values: Sequence[Any]) -> bool:
    return any(isinstance(value, torch.Tensor) and value.dtype.itemsize == 1 for value in values)


@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("op", EXPRESSIBLE)
def test_torch_finds_nothing_wrong_with_the_registration(op: str, platform: str) -> None:
    device, contract, weights = load_platform(platform).device(), contracts()[op], HeldWeights()
    num_checked = 0
    for kernel in usable_kernels(op, platform):
        operator = traced(kernel, device, weights)
        registered = getattr(torch.ops.lockstep, f"{op}_{kernel.provider}").default
        # Torch makes no fakes of the tensors that oneDNN packs.
        is_fakeable = kernel.prepare is None or kernel.opaque
        for case in accepted_cases(contract, kernel) if is_fakeable else ():
            arguments = prepared(contract, operator, made(case, device))
            # Torch's schema test compares with arithmetic that it lacks for float8.
            tests = ("test_faketensor", "test_aot_dispatch_dynamic") + ("test_schema",) * (
                not has_float8(arguments)
            )
            torch.library.opcheck(registered, tuple(arguments), test_utils=tests)
            num_checked += 1
    assert num_checked > 0


@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("op", EXPRESSIBLE)
def test_the_operator_gives_the_kernels_own_bits(op: str, platform: str) -> None:
    device, contract, weights = load_platform(platform).device(), contracts()[op], HeldWeights()
    for kernel in usable_kernels(op, platform):
        operator = traced(kernel, device, weights)
        for case in accepted_cases(contract, kernel):
            direct = prepared(contract, kernel, made(case, device))
            through = prepared(contract, operator, made(case, device))
            assert_same_bits(operator.function(*through), kernel.function(*direct))
            for argument, one, other in zip(contract.arguments, through, direct, strict=False):
                if argument.written:
                    assert_same_bits(one, other)


def test_what_a_schema_cannot_express_is_refused() -> None:
    """An argument of each call that is no tensor; a weight that is none goes by a number."""
    contract = contracts()["rms_norm"]
    changed = replace(
        contract, arguments=(replace(contract.arguments[0], opaque=True), *contract.arguments[1:])
    )
    with pytest.raises(KernelError, match="operator 'rms_norm' cannot be traced: x is no tensor"):
        library._Registration("unused", changed, kernels("rms_norm")[0], torch.device("cpu"))


def test_rows_of_a_weight_that_is_no_tensor_can_be_taken() -> None:
    native = next(kernel for kernel in kernels("linear") if kernel.provider == "native")
    sizes = {"inputs": 64, "outputs": 32, "bias": False}
    assert native.take_rows is not None and native.refuses({"dtype": torch.bfloat16, **sizes}) is None
    weights = HeldWeights()
    operator = traced(native, torch.device("cpu"), weights)
    assert operator.prepare is not None and operator.take_rows is not None
    plain = torch.randn(32, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    number, ids = operator.prepare(plain), torch.tensor([31, 0, 7])
    assert_same_bits(operator.take_rows(number, ids), plain[ids].float())
    rows = torch.ops.lockstep.linear_native_rows.default
    torch.library.opcheck(rows, (number, ids), test_utils=("test_schema", "test_faketensor"))
    del weights, operator
    with pytest.raises(KernelError, match="the selector that bound it must outlive the model"):
        rows(number, ids)


def assert_same_bits(found: Any, expected: Any) -> None:
    if isinstance(expected, tuple):
        assert isinstance(found, tuple) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other)
    elif expected is None:
        assert found is None
    else:
        one, other = (
            value.cpu().clone(memory_format=torch.contiguous_format).view(torch.uint8)
            for value in (found, expected)
        )
        assert found.dtype == expected.dtype and torch.equal(one, other)


WIDTH, INNER, HEADS, HEAD_DIM, PAGE_SIZE = 64, 96, 4, 16, 4


class Stack:
    """Norm, products, activation, norm with residual and the KV store, each bound as layers bind it."""

    def __init__(self, build: Build) -> None:
        self.norm = RMSNorm(build, "norm", WIDTH, 1e-5)
        self.gate_up = Product(build, "gate_up", (build.weight("gate_up.weight", (2 * INNER, WIDTH)),), None)
        self.activate = build.bind("silu_and_mul", "activate", width=INNER).function
        self.down = Product(build, "down", (build.weight("down.weight", (WIDTH, INNER)),), None)
        self.add_norm = AddRMSNorm(build, "add_norm", WIDTH, 1e-5)
        self.store = build.bind("kv_store", "store", pool_dtype=torch.float32, page_size=PAGE_SIZE).function

    def __call__(
        self, x: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        update = self.down(self.activate(self.gate_up(self.norm(x))))
        normed, residual = self.add_norm(update, x.clone())
        k, v = (rows.view(-1, HEADS, HEAD_DIM) for rows in (normed, residual))
        self.store(k, v, k_pool, v_pool, slots)
        return normed + residual


def stack_on(platform_name: str, selector: type[KernelSelector]) -> tuple[Stack, KernelSelector]:
    platform = load_platform(platform_name)
    bound = selector(platform.capabilities(), platform.kernel_preference)
    device = platform.device()
    build = Build(Mesh.solo(), device, torch.float32, torch.float32, RandomWeights(3), bound, 64, PAGE_SIZE)
    return Stack(build), bound


def inputs(device: torch.device, num_tokens: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(num_tokens)
    pools = (torch.zeros(HEADS, 8, PAGE_SIZE, HEAD_DIM) for _ in range(2))
    slots = torch.randperm(8 * PAGE_SIZE, generator=g)[:num_tokens]
    return placed([torch.randn(num_tokens, WIDTH, generator=g), *pools, slots], device)


@pytest.mark.parametrize("platform", DEVICES)
def test_a_compiled_stack_calls_the_bound_kernels_and_gives_the_same_bits(platform: str) -> None:
    device = load_platform(platform).device()
    plain, plain_kernels = stack_on(platform, KernelSelector)
    traced, traced_kernels = stack_on(platform, TraceableSelector)
    graphs: list[torch.fx.GraphModule] = []

    def backend(module: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Any:
        graphs.append(module)
        return aot_eager(module, examples)

    torch._dynamo.reset()
    compiled = torch.compile(traced.__call__, backend=backend, fullgraph=True)
    with torch.inference_mode():
        for num_tokens in (5, 9, 17):
            results = []
            for function in (plain, traced, compiled):
                arguments = inputs(device, num_tokens)
                results.append((function(*arguments), *arguments))
            for found in results[1:]:
                assert_same_bits(found, results[0])
    names = [f"{binding.op}_{binding.kernel.provider}" for binding in traced_kernels.bindings]
    assert names == [f"{binding.op}_{binding.kernel.provider}" for binding in plain_kernels.bindings]
    assert all(Counter(kernels_called(module.graph)) == Counter(names) for module in graphs)
    assert 1 <= len(graphs) <= 2  # The second one for any number of tokens.


@pytest.mark.parametrize("platform", DEVICES)
def test_kernels_are_counted_in_functional_graphs_too(platform: str) -> None:
    """After functionalisation an operator that writes is an argument of another call."""
    traced, bound = stack_on(platform, TraceableSelector)
    graphs: list[torch.fx.Graph] = []

    def keep(module: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Any:
        graphs.append(module.graph)
        return module.forward

    torch._dynamo.reset()
    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(traced.__call__, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    with torch.no_grad():
        compiled(*inputs(load_platform(platform).device(), 5))
    names = [f"{binding.op}_{binding.kernel.provider}" for binding in bound.bindings]
    assert Counter(kernels_called(graphs[0])) == Counter(names)


def test_operators_exist_only_for_kernels_that_were_asked_for(fresh: Any) -> None:
    asked = """
import torch
from lockstep.ops.library import traceable
from lockstep.ops.registry import contracts, kernels
contracts()
traceable(kernels("rms_norm")[0], torch.device("cpu"))
print(sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lockstep::")))
"""
    assert fresh.output(asked) == "['lockstep::rms_norm_reference']"


def test_an_argument_that_torch_cannot_express_is_an_error() -> None:
    def reference(x: torch.Tensor, spans: Sequence[Case]) -> torch.Tensor:
        return x

    contract = replace(
        contracts()["rms_norm"], reference=reference, arguments=(Argument("x", ("row",)), Argument("spans"))
    )
    with pytest.raises(KernelError, match=r"'rms_norm' cannot be traced: .*spans has unsupported type"):
        library._Registration("made_up", contract, kernels("rms_norm")[0], torch.device("cpu"))


def test_one_name_stands_for_one_kernel() -> None:
    kernel = kernels("rms_norm")[0]
    assert traceable(kernel, torch.device("cpu")) is traceable(kernel, torch.device("cpu"))
    with pytest.raises(KernelError, match="already stands for another kernel called 'reference'"):
        traceable(replace(kernel, function=lambda *arguments: arguments[0]), torch.device("cpu"))


def test_results_that_lie_in_arguments_come_back_as_those_arguments() -> None:
    in_place = next(kernel for kernel in kernels("add_rms_norm") if kernel.provider == "torch")
    update, residual, weight = (torch.ones(3, 8) for _ in range(3))
    _, total = traceable(in_place, torch.device("cpu"))(update, residual, weight[0], 1e-5)
    assert total is residual and residual[0, 0] == 2.0
    schema = torch.ops.lockstep.add_rms_norm_torch.default._schema
    assert len(schema.returns) == 1 and schema.arguments[1].alias_info.is_write


def test_a_result_that_is_an_argument_is_copied() -> None:
    """A kernel may hand back what it was given where there is nothing to do; torch may not be told so."""
    lazy = replace(kernels("rms_norm")[0], provider="lazy one", function=lambda x, weight, eps: x[:])
    x = torch.randn(2, 8)
    out = traceable(lazy, torch.device("cpu"))(x, torch.ones(8), 1e-5)
    assert torch.equal(out, x) and out.data_ptr() != x.data_ptr()
    assert "rms_norm_lazy_one" in library._registered
