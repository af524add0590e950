"""Adding an operator touches one folder, adding a kernel one file, and a package from outside neither."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

import lockstep.ops
import lockstep.ops.rms_norm.kernels
from lockstep.core.capabilities import Capabilities
from lockstep.core.errors import KernelError
from lockstep.ops import registry
from lockstep.ops.check import check_kernel, check_mutants
from lockstep.ops.registry import contracts, kernels
from lockstep.ops.selection import KernelSelector

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
    registry.contracts.cache_clear()
    registry.kernels.cache_clear()


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


def test_a_kernel_is_one_file(folder: Path) -> None:
    write(
        folder / "rms_norm" / "kernels" / "mine.py",
        KERNEL.format(op="rms_norm", provider="mine", function=EXACT_NORM),
    )
    mine = next(kernel for kernel in kernels("rms_norm") if kernel.provider == "mine")
    assert check_kernel(contracts()["rms_norm"], mine, seed=0).passed
    signature = {"dtype": None, "width": 8, "weight_dtype": None}
    assert KernelSelector(HERE, ("mine",)).bind("rms_norm", "norm", signature).kernel is mine


def test_two_kernels_of_one_provider_are_an_error(folder: Path) -> None:
    write(
        folder / "rms_norm" / "kernels" / "again.py",
        KERNEL.format(op="rms_norm", provider="torch", function=EXACT_NORM),
    )
    with pytest.raises(KernelError, match="two kernels of one provider"):
        kernels("rms_norm")


def test_a_package_from_outside_offers_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the entry point, with no file of ours touched."""
    write(
        folder / "site" / "their_kernels.py",
        KERNEL.format(op="rms_norm", provider="theirs", function=EXACT_NORM),
    )
    metadata = folder / "site" / "their_kernels-1.0.dist-info"
    write(metadata / "METADATA", "Metadata-Version: 2.1\nName: their-kernels\nVersion: 1.0\n")
    write(metadata / "entry_points.txt", "[lockstep.kernels]\ntheirs = their_kernels:KERNELS\n")
    monkeypatch.syspath_prepend(str(folder / "site"))
    theirs = next(kernel for kernel in kernels("rms_norm") if kernel.provider == "theirs")
    assert check_kernel(contracts()["rms_norm"], theirs, seed=0).passed
    assert all(kernel.provider != "theirs" for kernel in kernels("linear"))
