"""Habits that can be read off the text: device names, the environment, unfinished work, sizes."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Iterable, Iterator

import pytest
from source_tree import Module, modules

pytestmark = pytest.mark.suite("cpu")

DEVICE = re.compile(r"(cpu|cuda|rocm|hip|musa|xpu|npu|mps|hpu|meta|sim|gloo|nccl|rccl|mccl)(:\d+)?")
DEVICE_ATTRIBUTE = re.compile(
    r"\b(torch\.(cuda|xpu|mps|hip|musa|npu)|\w+\.is_(cuda|cpu|xpu|mps)|torch\.version\.(cuda|hip))\b"
)

DEVICES_ALLOWED = {
    (
        "models/loading/sources.py",
        "meta",
    ): "shapes without values live on torch's meta device, which is no hardware",
    ("quantization/held.py", "meta"): "as above",
    ("ops/triton_launch.py", "meta"): "as above",
    ("ops/check.py", "cpu"): "the reference runs in float64 on the host, whatever the kernel runs on",
    ("ops/native.py", "cpu"): "the one place that says where the extension's kernels run",
    ("ops/registry.py", "cpu"): "references are verified where the tests run",
    (
        "ops/dependent_launch.py",
        "cuda",
    ): "Triton's name of the one backend whose launches have the attribute",
    (
        "parallel/processes.py",
        "gloo",
    ): "the one place that turns the name of a collective library into its group",
    ("parallel/processes.py", "nccl"): "as above",
    (
        "parallel/processes.py",
        "torch.cuda.set_device",
    ): "NCCL's group binds to the current device when it is made",
}

UNFINISHED = re.compile(r"\bNotImplemented(Error)?\b|\b(TODO|FIXME|XXX|HACK)\b")


def may_name_devices(module: Module) -> bool:
    return module.room == "platforms" or re.match(r"ops/\w+/kernels/", module.where) is not None


def device_names(found: Iterable[Module]) -> Iterator[tuple[str, str]]:
    """(file, name) of each device or collective library named outside platforms/ and ops/*/kernels/."""
    for module in found:
        if not may_name_devices(module):
            yield from ((module.where, text) for _, text in module.strings() if DEVICE.fullmatch(text))
            yield from (
                (module.where, text) for _, text in module.attributes() if DEVICE_ATTRIBUTE.search(text)
            )


def environment_uses(found: Iterable[Module]) -> Iterator[str]:
    """Every touch of the process's environment outside the one file that reads it."""
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    for module in found:
        if module.where == "config/environment.py":
            continue
        for line, text in module.attributes():
            if set(text.split(".")) & names:
                yield f"{module.where}:{line} {text}"
        for line, text in module.imports():
            if text.startswith("os.") and set(text.split(".")) & names:
                yield f"{module.where}:{line} {text}"


def environment_writes(found: Iterable[Module]) -> Iterator[str]:
    """Assignments to, deletions from and changing calls on os.environ, anywhere."""
    writes = re.compile(r"\bos\.(environb?\.(update|setdefault|pop|popitem|clear|__\w+)|putenv|unsetenv)\b")
    for module in found:
        yield from (
            f"{module.where}:{line} {text}" for line, text in module.attributes() if writes.search(text)
        )
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.Subscript) or isinstance(node.ctx, ast.Load):
                continue
            if ast.unparse(node).startswith("os.environ"):
                yield f"{module.where}:{node.lineno} {ast.unparse(node)}"


def empty_functions(found: Iterable[Module]) -> Iterator[str]:
    """Functions with no body that belong to no protocol and are not abstract. A docstring alone is a body: it says
    why there is nothing to do."""
    for module in found:
        promised = {
            id(member)
            for node in ast.walk(module.tree)
            if isinstance(node, ast.ClassDef)
            and any(ast.unparse(base).startswith("Protocol") for base in node.bases)
            for member in node.body
        }
        for function in module.functions():
            body = [each for each in function.body if not isinstance(each, ast.Expr)]
            constants = [each.value for each in function.body if isinstance(each, ast.Expr)]
            only_ellipsis = any(isinstance(each, ast.Constant) and each.value is ... for each in constants)
            empty = all(isinstance(each, ast.Pass) for each in body) and (only_ellipsis or bool(body))
            marks = {ast.unparse(mark).rpartition(".")[2] for mark in function.decorator_list}
            if empty and id(function) not in promised and not marks & {"abstractmethod", "overload"}:
                yield f"{module.where}:{function.lineno} {function.name}"


def unfinished(found: Iterable[Module]) -> Iterator[str]:
    """Words that promise work for another day."""
    for module in found:
        for number, line in enumerate(module.text.splitlines(), 1):
            if UNFINISHED.search(line):
                yield f"{module.where}:{number} {line.strip()}"


def test_devices_are_named_only_where_they_belong() -> None:
    found = set(device_names(modules()))
    assert sorted(found - set(DEVICES_ALLOWED)) == []
    assert sorted(set(DEVICES_ALLOWED) - found) == [], "allowed, but nobody names it any more"


def test_the_environment_is_read_in_one_file_and_never_written() -> None:
    assert list(environment_uses(modules())) == []
    assert list(environment_writes(modules())) == []
    reader = next(module for module in modules() if module.where == "config/environment.py")
    assert any(text.startswith("os.environ") for _, text in reader.attributes()), "nothing was selected"


def test_nothing_is_left_for_another_day() -> None:
    assert list(unfinished(modules())) == []
    assert list(empty_functions(modules())) == []


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (device_names, 'x = "cuda"'),
        (device_names, 'x = f"cuda:0"'),
        (device_names, "import torch\nx = torch.cuda.is_available()"),
        (device_names, "def f(t):\n    return t.is_cuda"),
        (environment_uses, 'import os\nx = os.environ.get("HOME")'),
        (environment_uses, 'import os\nx = os.getenv("HOME")'),
        (environment_uses, "from os import environ"),
        (environment_writes, 'import os\nos.environ["X"] = "1"'),
        (environment_writes, 'import os\ndel os.environ["X"]'),
        (environment_writes, 'import os\nos.environ.setdefault("X", "1")'),
        (environment_writes, 'import os\nos.putenv("X", "1")'),
        (unfinished, "raise NotImplementedError"),
        (unfinished, "x = 1  # TODO later"),
        (empty_functions, "def f():\n    ..."),
        (empty_functions, 'def f():\n    """Says something."""\n    pass'),
        (empty_functions, "class A:\n    def f(self): ..."),
    ],
)
def test_each_check_finds_what_it_looks_for(
    check: Callable[[Iterable[Module]], Iterator[object]], text: str
) -> None:
    assert list(check([Module("layers/wrong.py", text)]))


def test_checks_leave_alone_what_is_right() -> None:
    right = Module(
        "layers/right.py",
        '"""cuda"""\nfrom typing import Protocol\n\nclass A(Protocol):\n    def f(self) -> None: ...\n\n'
        'def nothing() -> None:\n    """There is nothing to wait for."""\n\nname = "cudagraph"\n',
    )
    for check in (device_names, environment_uses, environment_writes, unfinished, empty_functions):
        assert list(check([right])) == []
    assert list(device_names([Module("ops/rope/kernels/fast.py", 'x = "cuda"')])) == []


def test_sizes_as_questions() -> None:
    """A long file or function is a question to answer, not a failure: it is shown as a warning."""
    questions, longest = [], 0
    for module in modules():
        num_lines = len(module.text.splitlines())
        longest = max(longest, num_lines)
        if num_lines > 500:
            questions.append(f"{module.where} has {num_lines} lines")
        for function in module.functions():
            size = (function.end_lineno or function.lineno) - function.lineno + 1
            if size > 80:
                questions.append(f"{module.where}: {function.name} has {size} lines")
    print(f"{len(modules())} files, the longest has {longest} lines; {len(questions)} questions")
    for question in questions:
        warnings.warn(question, stacklevel=1)
    assert longest > 100, "nothing was measured"
