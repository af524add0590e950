"""The page of all operators and kernels: `python -m lockstep.ops.page > docs/operators.md`."""

from __future__ import annotations

from collections.abc import Iterator

from lockstep.ops.contract import Argument, Contract, Kernel
from lockstep.ops.registry import contracts, kernels

_HEAD = """\
# Operators

<!-- Generated: python -m lockstep.ops.page > docs/operators.md -->

Each operator has one contract, from which this page, the checks and the measurements are made. A kernel is verified on
the devices where `lockstep ops check` passed with it; one that says "nothing yet" was not checked on any.

```sh
lockstep ops list                                # this page's table, for what is installed
lockstep ops explain MODEL                       # which kernel each layer of a model gets, and why
lockstep ops check --platform cpu --jobs 2       # every kernel against its contract
lockstep ops bench rms_norm --plot rms_norm.png  # time, and the share of what the machine can do
```

| operator | kernel | platforms | needs | verified on |
|---|---|---|---|---|
"""


def operators_page() -> str:
    """The page as Markdown, ending in one newline."""
    found = sorted(contracts().items())
    rows = [line for name, _ in found for line in _rows(name)]
    return _HEAD + "\n".join([*rows, "", *(line for _, contract in found for line in _section(contract))])


def kernel_cells(kernel: Kernel) -> tuple[str, str, str, str]:
    """Provider, platforms, features that it needs, and where it was verified."""
    return (
        kernel.provider,
        ", ".join(sorted(kernel.platforms)) or "any",
        ", ".join(sorted(kernel.features)),
        ", ".join(kernel.verified_on) or "nothing yet",
    )


def _rows(name: str) -> Iterator[str]:
    for number, kernel in enumerate(kernels(name)):
        label = f"[`{name}`](#{name})" if number == 0 else ""
        yield f"| {' | '.join((label, *kernel_cells(kernel)))} |"


def _section(contract: Contract) -> Iterator[str]:
    yield f"## {contract.name}\n"
    yield f"{contract.summary}.\n"
    yield from (_argument(argument) for argument in contract.arguments)
    if contract.returns:
        yield f"- gives {', '.join(f'`{text}`' for text in contract.returns)}"
    yield f"- rounding: {contract.rounding}"
    yield f"- known-wrong versions that its tolerances reject: {', '.join(contract.mutants)}"
    if contract.workload is not None:
        sizes = ", ".join(map(str, contract.workload.sizes))
        yield f"- timed over {contract.workload.axis}: {sizes}"
    yield ""


def _argument(argument: Argument) -> str:
    axes = f"[{', '.join(argument.axes)}]" if argument.axes else ""
    marks = [word for word in ("written", "scratch", "constant") if getattr(argument, word)]
    said = "; ".join(text for text in (*marks, argument.note) if text)
    return f"- `{argument.name}{axes}`{f': {said}' if said else ''}"


if __name__ == "__main__":
    print(operators_page(), end="")
