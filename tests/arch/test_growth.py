"""Adding an operator touches one folder, adding a kernel one file, and a package from outside neither.

Each is bound under preferences that were written before it. One command makes the page of operators anew.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch

import lockstep.ops
import lockstep.ops.rms_norm.kernels
from lockstep.core.capabilities import Capabilities
from lockstep.core.errors import KernelError
from lockstep.ops import registry
from lockstep.ops.check import check_kernel, check_mutants
from lockstep.ops.page import operators_page
from lockstep.ops.registry import contracts, kernels, require_providers
from lockstep.ops.selection import KernelSelector
from lockstep.platforms.registry import load_platform, platform_names

pytestmark = pytest.mark.suite("cpu")

HERE = Capabilities(platform="here", device_type="cpu", device_name="a test")

CONTRACT = """
    from lockstep.ops.cases import DTYPES, normal
    from lockstep.ops.contract import Argument, Case, Contract, rounded


    def halve(x):
        return (x.float() / 2).to(x.dtype)


    def cases():
        for dtype in DTYPES:
            yield Case(str(dtype), {"dtype": dtype}, lambda g, dtype=dtype: (normal(g, 5, 7, dtype=dtype),))


    CONTRACT = Contract(
        name="halve",
        summary="x / 2",
        arguments=(Argument("x", ("row", "width")),),
        returns=("out[row, width]",),
        rounding="none",
        signature=("dtype",),
        reference=halve,
        cases=cases,
        tolerance=rounded(1, maths=1),
        mutants={"a third": lambda x: x / 3},
    )
"""

KERNEL = """
    from lockstep.ops.contract import Kernel

    KERNELS = (Kernel(op="{op}", provider="{provider}", function={function}),)
"""

EXACT_NORM = "lambda x, weight, eps: __import__('torch').rms_norm(x, x.shape[-1:], weight, eps)"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(text))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stands for lockstep/ops: what is written below it is part of the package while the test runs."""
    monkeypatch.setattr(lockstep.ops, "__path__", [*lockstep.ops.__path__, str(tmp_path)])
    norms = lockstep.ops.rms_norm.kernels
    monkeypatch.setattr(norms, "__path__", [*norms.__path__, str(tmp_path / "rms_norm" / "kernels")])
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def forget() -> None:
    for found in (registry.contracts, registry.kernels, registry._kernels_from_outside):
        found.cache_clear()


def offer(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, *, name: str = "theirs") -> None:
    """Installs a package whose module of kernels is `text`."""
    write(folder / "site" / f"{name}_kernels.py", text)
    metadata = folder / "site" / f"{name}_kernels-1.0.dist-info"
    write(metadata / "METADATA", f"Metadata-Version: 2.1\nName: {name}-kernels\nVersion: 1.0\n")
    write(metadata / "entry_points.txt", f"[lockstep.kernels]\n{name} = {name}_kernels:KERNELS\n")
    monkeypatch.syspath_prepend(str(folder / "site"))


def bound_on(platform_name: str, op: str, signature: dict[str, Any]) -> str:
    """The provider that the platform's own preference gives a call."""
    platform = load_platform(platform_name)
    selector = KernelSelector(platform.capabilities(), platform.kernel_preference)
    return selector.bind(op, "somewhere", signature).kernel.provider


def test_an_operator_is_one_folder(folder: Path) -> None:
    """It is found, checked, and bound like any other."""
    write(folder / "halve" / "__init__.py", '"""Half of a value."""')
    write(folder / "halve" / "contract.py", CONTRACT)
    write(folder / "halve" / "kernels" / "__init__.py", '"""Kernels."""')
    write(
        folder / "halve" / "kernels" / "fast.py",
        KERNEL.format(op="halve", provider="fast", function="lambda x: x * 0.5"),
    )
    contract = contracts()["halve"]
    assert [kernel.provider for kernel in kernels("halve")] == ["reference", "fast"]
    assert all(check_kernel(contract, kernel, seed=0).passed for kernel in kernels("halve"))
    assert check_mutants(contract, 0) == []
    chosen = KernelSelector(HERE, ("fast",)).bind("halve", "here", {"dtype": None})
    assert chosen.function(4.0) == 2.0
    assert [bound_on(name, "halve", {"dtype": None}) for name in ("cpu", "sim")] == ["fast", "fast"]
    assert "## halve\n" in operators_page() and "|  | fast | any |  | nothing yet |" in operators_page()


def test_a_kernel_is_one_file(folder: Path) -> None:
    write(
        folder / "rms_norm" / "kernels" / "mine.py",
        KERNEL.format(op="rms_norm", provider="mine", function=EXACT_NORM),
    )
    mine = next(kernel for kernel in kernels("rms_norm") if kernel.provider == "mine")
    assert check_kernel(contracts()["rms_norm"], mine, seed=0).passed
    signature: dict[str, Any] = {"dtype": None, "width": 8, "weight_dtype": None}
    assert KernelSelector(HERE, ("mine",)).bind("rms_norm", "norm", signature).kernel is mine
    signature = {"dtype": torch.float32, "width": 8, "weight_dtype": torch.float32}
    assert bound_on("sim", "rms_norm", signature) == "mine"


def test_two_kernels_of_one_provider_are_an_error(folder: Path) -> None:
    write(
        folder / "rms_norm" / "kernels" / "again.py",
        KERNEL.format(op="rms_norm", provider="torch", function=EXACT_NORM),
    )
    with pytest.raises(KernelError, match="two kernels of one provider"):
        kernels("rms_norm")


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        (
            "rms_norm/kernels/empty.py",
            "",
            r"rms_norm\.kernels\.empty is to offer a tuple of kernels, and has no KERNELS",
        ),
        ("rms_norm/kernels/empty.py", "KERNELS = [1]", r"is to offer a tuple of kernels, and has \[1\]"),
        (
            "rms_norm/kernels/lost.py",
            KERNEL.format(op="linear", provider="lost", function=EXACT_NORM),
            "has a kernel of 'linear'; it lies in the folder of 'rms_norm'",
        ),
        ("halve/contract.py", "", r"lockstep\.ops\.halve\.contract has no CONTRACT"),
        (
            "halve/contract.py",
            CONTRACT.replace('"halve"', '"half"'),
            "is called 'half'; an operator has the name of its",
        ),
        ("halve/kernels/__init__.py", "", r"lockstep\.ops\.halve\.contract is missing"),
    ],
)
def test_a_folder_that_is_not_as_it_must_be_is_named(folder: Path, file: str, text: str, says: str) -> None:
    if file.startswith("halve"):
        write(folder / "halve" / "__init__.py", "")
    write(folder / file, text)
    with pytest.raises(KernelError, match=says):
        kernels("rms_norm")


def test_a_package_from_outside_offers_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the entry point, with no file of ours touched."""
    offer(folder, monkeypatch, KERNEL.format(op="rms_norm", provider="theirs", function=EXACT_NORM))
    theirs = next(kernel for kernel in kernels("rms_norm") if kernel.provider == "theirs")
    assert check_kernel(contracts()["rms_norm"], theirs, seed=0).passed
    assert all(kernel.provider != "theirs" for kernel in kernels("linear"))
    signature = {"dtype": torch.float32, "width": 8, "weight_dtype": torch.float32}
    assert bound_on("sim", "rms_norm", signature) == "theirs"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "import no_such_library",
            "cannot be imported: ModuleNotFoundError: No module named 'no_such_library'",
        ),
        ("raise RuntimeError('no driver')", "cannot be imported: RuntimeError: no driver"),
        ("OTHERS = ()", "cannot be imported: AttributeError"),
        ("KERNELS = 3", "is to offer a tuple of kernels, and has 3"),
        ("KERNELS = ('rms_norm',)", "is to offer a tuple of kernels, and has ('rms_norm',)"),
        (
            KERNEL.format(op="rms_nrom", provider="bad", function=EXACT_NORM),
            "'bad' is for unknown operator 'rms_nrom'; did you mean 'rms_norm'?",
        ),
        (
            KERNEL.format(op="rms_norm", provider="torch", function=EXACT_NORM),
            "operator 'rms_norm' would have two kernels of one provider: torch",
        ),
        (
            KERNEL.format(op="rms_norm", provider="fine", function=EXACT_NORM),
            "operator 'rms_norm' would have two kernels of one provider: fine",
        ),
    ],
)
def test_a_package_that_offers_something_else_is_left_out_and_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, text: str, says: str
) -> None:
    """What others offer, and what is built in, goes on."""
    before = [kernel.provider for kernel in kernels("rms_norm")]
    forget()
    offer(folder, monkeypatch, KERNEL.format(op="rms_norm", provider="fine", function=EXACT_NORM), name="fine")
    offer(folder, monkeypatch, text, name="wrong")
    assert [kernel.provider for kernel in kernels("rms_norm")] == [*before, "fine"]
    assert kernels("linear")
    (line,) = caplog.messages
    assert line.startswith("the kernels of package ") and says in line and "\n" not in line
    assert "wrong-kernels" in line or "fine" in says


def test_a_misspelt_preference_names_the_nearest() -> None:
    for name in platform_names():
        platform = load_platform(name)
        preferences = (platform.kernel_preference, platform.attention_preference, platform.extend_preference)
        for preference in preferences:
            require_providers(name, preference)
    require_providers("mychip", ("mychip", "torch"))
    with pytest.raises(
        KernelError, match=r"platform mychip prefers kernels of 'trton', .*did you mean 'triton'\?"
    ):
        require_providers("mychip", ("mychip", "trton"))
