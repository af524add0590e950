"""A small project with the shape of the real one, in a git repository of its own."""

from __future__ import annotations

import subprocess
import textwrap
from pathlib import Path

from lockstep.ci.affected.review import Review, review

KERNEL = """
from lockstep.ops.contract import Kernel
from lockstep.ops.{op}.programs import program
KERNELS = (Kernel(op="{op}", provider="{provider}", function=program, verified_on={devices!r}),)
"""
CONTRACT = """
from lockstep.ops.contract import Contract
LIMIT = 1e-6
def wrong(x):
    return x
CONTRACT = Contract(name="{op}", tolerance=rounded(1, maths=LIMIT), mutants={{"one short": wrong, "twice": wrong}})
"""
TEST = "import pytest\npytestmark = pytest.mark.suite({suites})\n"

FILES = {
    "pyproject.toml": """
        [tool.lockstep.testing.suites.cpu]
        platform = "cpu"
        [tool.lockstep.testing.suites.cuda-1]
        platform = "cuda"
        """,
    "README.md": "A project.",
    "docs/http.md": "Routes.",
    ".ci/run": "lockstep eval gsm8k --min-accuracy 0.5\nlockstep suites run --suite cpu\n",
    "csrc/fast.cpp": "int main() {}",
    "src/lockstep/__init__.py": """
        def __getattr__(name):
            from lockstep.engine.llm import LLM
            return LLM
        """,
    "src/lockstep/core/__init__.py": "",
    "src/lockstep/core/clock.py": "def now_s() -> float:\n    return 0.0\n",
    "src/lockstep/ops/__init__.py": "",
    "src/lockstep/ops/contract.py": "class Contract: ...\nclass Kernel: ...\n",
    "src/lockstep/ops/registry.py": """
        import importlib, pkgutil
        import lockstep.ops
        def contracts():
            for module in pkgutil.iter_modules(lockstep.ops.__path__):
                yield importlib.import_module(f"lockstep.ops.{module.name}.contract")
        def kernels(op):
            package = importlib.import_module(f"lockstep.ops.{op}.kernels")
            for module in pkgutil.iter_modules(package.__path__):
                yield importlib.import_module(f"{package.__name__}.{module.name}")
        """,
    **{
        f"src/lockstep/ops/{op}/{name}": text.format(op=op, provider=name[8:-3], devices=devices)
        for op in ("scale", "shift")
        for name, text, devices in (
            ("__init__.py", "", ()),
            ("contract.py", CONTRACT, ()),
            ("programs.py", "def program(x):\n    return x\n", ()),
            ("kernels/__init__.py", "", ()),
            ("kernels/fast.py", KERNEL, ("A card",)),
            ("kernels/rare.py", KERNEL, ()),
        )
    },
    "src/lockstep/ops/shift/kernels/native.py": """
        from lockstep.ops.compiled import compiled_kernels
        KERNELS = compiled_kernels("shift", print)
        """,
    "src/lockstep/ops/compiled.py": """
        from lockstep.native.loader import extension
        from lockstep.ops.contract import Kernel
        def compiled_kernels(op, function):
            return (Kernel(op=op, provider="native", verified_on=("cpu",)),)
        """,
    "src/lockstep/platforms/__init__.py": "",
    "src/lockstep/platforms/card/__init__.py": """
        class CardPlatform:
            name = "cuda"
            kernel_preference = (*FIRST, "fast", "reference")
            attention_preference: ClassVar[tuple[str, ...]] = ("fast",)
        """,
    "src/lockstep/platforms/processor.py": """
        class CpuPlatform:
            name = "cpu"
            kernel_preference = ("native", "rare")
        """,
    "src/lockstep/native/__init__.py": "",
    "src/lockstep/native/loader.py": "def extension(): ...\n",
    "src/lockstep/layers/__init__.py": "",
    "src/lockstep/layers/norm.py": 'def norm(build):\n    return build.bind("scale")\n',
    "src/lockstep/layers/move.py": 'def move(build):\n    return build.bind("shift")\n',
    "src/lockstep/models/__init__.py": "",
    "src/lockstep/models/llm/__init__.py": "",
    "src/lockstep/models/llm/decoder.py": "class Decoder:\n    architectures: tuple\n",
    "src/lockstep/models/llm/apple.py": """
        from lockstep.layers.norm import norm
        from lockstep.models.llm.decoder import Decoder
        class Apple(Decoder):
            architectures = ("A",)
        """,
    "src/lockstep/models/llm/pear.py": """
        from lockstep.layers.move import move
        from lockstep.models.llm.decoder import Decoder
        class Pear(Decoder):
            architectures = ("P",)
        """,
    "src/lockstep/engine/__init__.py": "",
    "src/lockstep/engine/llm.py": """
        import lockstep.models.llm.apple
        from lockstep.ops import registry
        class LLM:
            def generate(self, prompt: str) -> str:
                return prompt
        """,
    "src/lockstep/engine/worker.py": "import lockstep.core.clock\n",
    "src/lockstep/server/__init__.py": "",
    "src/lockstep/server/app.py": """
        from pathlib import Path
        from typing import TYPE_CHECKING
        from lockstep.core.clock import now_s
        if TYPE_CHECKING:
            from lockstep.engine.llm import LLM
        PAGE = Path(__file__).parent / "static" / "page.html"
        """,
    "src/lockstep/server/static/page.html": "<p>",
    "src/lockstep/server/orphan.py": "def alone() -> None:\n    return None\n",
    "src/lockstep/ci/__init__.py": "",
    "src/lockstep/ci/gates/__init__.py": "",
    "src/lockstep/ci/gates/limit.py": "LIMIT = 0.5\n",
    "src/lockstep/cli/__init__.py": "",
    "src/lockstep/cli/main.py": """
        import importlib
        def main(name):
            return importlib.import_module(f"lockstep.cli.{name}").command
        """,
    "src/lockstep/cli/eval.py": "from lockstep.engine.llm import LLM\nfrom lockstep.ci.gates.limit import LIMIT\n",
    "baselines/card.json": "{}",
    "tests/conftest.py": "",
    "tests/server/conftest.py": "",
    "tests/server/askers.py": "def ask(): ...\n",
    "tests/server/test_app.py": TEST.format(suites='"cpu"')
    + """
from askers import ask
from lockstep.server.app import PAGE
def test_page(): ...
def test_more(): ...
""",
    "tests/ops/test_parity.py": TEST.format(suites='"cpu", "cuda-1"')
    + """
from lockstep.ops.registry import contracts, kernels
def test_parity(): ...
""",
    "tests/engine/test_llm.py": TEST.format(suites='"cpu"')
    + """
from lockstep import LLM
FACTS = "facts.json"
def test_llm(): ...
""",
    "tests/engine/facts.json": "[]",
    "tests/engine/test_worker.py": TEST.format(suites='"cpu", stage="nightly"')
    + """
import subprocess, sys
def test_worker():
    subprocess.run([sys.executable, "-m", "lockstep.engine.worker"])
""",
    "tests/cli/test_main.py": TEST.format(suites='"cpu"')
    + """
from lockstep.cli.main import main
def test_main(): ...
""",
}


class SmallProject:
    """A checkout whose first commit, tagged "base", holds FILES."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.git("init", "-q", "-b", "main")
        for path, text in FILES.items():
            self.write(path, text)
        self.commit()
        self.git("tag", "base")

    def git(self, *arguments: str) -> str:
        identity = (
            "-c",
            "user.name=tester",
            "-c",
            "user.email=tester@example.org",
            "-c",
            "core.hooksPath=/dev/null",
        )
        command = ["git", "-C", str(self.root), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "-q", "-m", "more")

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(textwrap.dedent(text).lstrip("\n"), "utf-8")

    def append(self, path: str, text: str = "# more\n") -> None:
        self.write(path, self.text(path) + text)

    def replace(self, path: str, old: str, new: str) -> None:
        text = self.text(path)
        assert old in text, f"{path} has no {old!r}"
        self.write(path, text.replace(old, new))

    def text(self, path: str) -> str:
        return (self.root / path).read_text("utf-8")

    def review(self, base: str = "base") -> Review:
        return review(self.root, base)

    def touched(self) -> set[str]:
        """The test files that the working tree's changes touch, by their names without `test_` and `.py`."""
        files = {file for suite in self.review().suites for file in suite.files}
        return {Path(file).stem.removeprefix("test_") for file in files}

    def risks(self) -> list[str]:
        return [risk.text for risk in self.review().risks]
