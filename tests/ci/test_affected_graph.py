"""Changes are followed to the tests that would notice them, in small repositories and against Python's own imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from affected_project import SmallProject

from lockstep.ci.affected.graph import SourceGraph

pytestmark = pytest.mark.suite("cpu", seconds=15)

PROJECT = Path(__file__).parents[2]
ALL = {"app", "parity", "llm", "worker", "main"}
CODE = "\nx = 1\n"


@pytest.fixture
def project(tmp_path: Path) -> SmallProject:
    return SmallProject(tmp_path)


@pytest.mark.parametrize(
    ("path", "touched"),
    [
        ("README.md", set()),
        ("docs/http.md", set()),
        ("src/lockstep/core/clock.py", {"app", "worker"}),
        ("src/lockstep/layers/norm.py", {"llm", "main"}),
        ("src/lockstep/models/llm/pear.py", set()),
        ("src/lockstep/engine/llm.py", {"llm", "main"}),
        ("src/lockstep/engine/worker.py", {"worker"}),
        ("src/lockstep/ops/contract.py", {"parity", "llm", "main"}),
        ("src/lockstep/ops/shift/kernels/rare.py", {"parity", "llm", "main"}),
        ("src/lockstep/ops/shift/programs.py", {"parity", "llm", "main"}),
        ("src/lockstep/server/app.py", {"app"}),
        ("src/lockstep/server/static/page.html", {"app"}),
        ("src/lockstep/server/orphan.py", set()),
        ("src/lockstep/cli/eval.py", {"main"}),
        ("src/lockstep/__init__.py", ALL),
        ("tests/server/askers.py", {"app"}),
        ("tests/server/conftest.py", {"app"}),
        ("tests/conftest.py", ALL),
        ("tests/engine/facts.json", {"llm"}),
        ("tests/engine/test_worker.py", {"worker"}),
        ("pyproject.toml", ALL),
        (".ci/run", ALL),
        (".ci/durations.json", set()),
        (".github/workflows/ci.yml", ALL),
        ("scripts/ci/install_cpu.sh", ALL),
        ("csrc/fast.cpp", ALL),
        ("src/lockstep/ci/plugin.py", ALL),
    ],
)
def test_a_change_touches_the_tests_that_need_it(project: SmallProject, path: str, touched: set[str]) -> None:
    if (project.root / path).exists():
        project.append(path)
    else:
        project.write(path, "")
    assert project.touched() == touched
    if touched == ALL and path.endswith(("toml", "yml", "sh", "cpp", "run", "plugin.py")):
        assert project.review().deciding == (path,)


def test_suites_say_which_files_and_stages(project: SmallProject) -> None:
    project.append("src/lockstep/core/clock.py")
    project.append("src/lockstep/ops/contract.py")
    cpu, cuda = project.review().suites
    assert (cpu.name, cuda.name) == ("cpu", "cuda-1")
    assert cpu.stages == ("per-commit", "nightly") and cuda.stages == ("per-commit",)
    assert cpu.num_files == len(cpu.files) == 5
    assert cuda.files == ("tests/ops/test_parity.py",) and cuda.num_files == 1


def test_whoever_still_names_a_deleted_or_moved_file_is_touched(project: SmallProject) -> None:
    project.git("rm", "-q", "src/lockstep/core/clock.py")
    assert project.touched() == {"app", "worker"}
    project.git("reset", "-q", "--hard")
    project.git("mv", "src/lockstep/layers/norm.py", "src/lockstep/layers/scaling.py")
    (change,) = project.review().changes
    assert (change.status, change.old_path) == ("moved", "src/lockstep/layers/norm.py")
    assert project.touched() == {"llm", "main"}


def test_committed_staged_and_untracked_changes_count_and_ignored_files_do_not(project: SmallProject) -> None:
    project.append("src/lockstep/core/clock.py", CODE)
    project.commit()
    project.append("docs/http.md")
    project.git("add", "docs/http.md")
    project.write("src/lockstep/core/new.py", "a = 1\nb = 2\n")
    project.write(".gitignore", "*.log\n")
    project.write("run.log", "")
    found = {change.path: (change.status, change.added, change.removed) for change in project.review().changes}
    assert found == {
        ".gitignore": ("added", 1, 0),
        "docs/http.md": ("changed", 1, 1),
        "src/lockstep/core/clock.py": ("changed", 2, 0),
        "src/lockstep/core/new.py": ("added", 2, 0),
    }


def test_what_happened_on_the_base_branch_since_is_not_the_change(project: SmallProject) -> None:
    project.git("checkout", "-q", "-b", "feature")
    project.append("src/lockstep/core/clock.py")
    project.commit()
    project.git("checkout", "-q", "main")
    project.append("pyproject.toml")
    project.commit()
    project.git("checkout", "-q", "feature")
    assert [change.path for change in project.review("main").changes] == ["src/lockstep/core/clock.py"]


def test_operators_and_models_are_those_that_compute_with_the_change(project: SmallProject) -> None:
    project.append("src/lockstep/ops/shift/programs.py", CODE)
    found = project.review()
    assert (found.operators, found.models) == (("shift",), ("pear",))
    project.git("checkout", "-q", ".")
    project.append("src/lockstep/ops/contract.py", CODE)
    assert project.review().operators == ("scale", "shift")
    project.git("checkout", "-q", ".")
    project.append("src/lockstep/models/llm/decoder.py", CODE)
    assert project.review().models == ("apple", "pear")


def test_names_with_spaces_quotes_and_umlauts(project: SmallProject) -> None:
    for name in ("docs/two words.md", 'docs/"quoted".md', "docs/größe.md", "docs/tab\there.md"):
        project.write(name, "text\n")
    assert len(project.review().changes) == 4
    project.commit()
    assert len(project.review().changes) == 4


TRACE = """
import builtins, importlib, json, sys
edges, plain, dynamic = set(), builtins.__import__, importlib.import_module
def note(importer, name, names=()):
    for each in (name, *(f"{name}.{part}" for part in names or ())):
        if importer.startswith("lockstep") and each.startswith("lockstep.") and each in sys.modules:
            edges.add((importer, each))
def traced(name, globals=None, locals=None, fromlist=(), level=0):
    module = plain(name, globals, locals, fromlist, level)
    note((globals or {}).get("__name__", ""), name, fromlist)
    return module
def asked(name, package=None):
    module = dynamic(name, package)
    note(sys._getframe(1).f_globals["__name__"], name)
    return module
builtins.__import__, importlib.import_module = traced, asked
import lockstep.cli.run, lockstep.cli.serve, lockstep.engine.llm, lockstep.server.app
from lockstep.models.registry import model_classes
from lockstep.ops.registry import contracts, kernels
from lockstep.platforms.registry import load_platform, platform_names
model_classes()
[kernels(op) for op in contracts()]
[load_platform(name) for name in platform_names()]
print(json.dumps(sorted(edges)))
"""


def test_every_import_that_python_makes_is_in_the_graph() -> None:
    """Python itself is the judge: each import that the engine really makes must be a step in the graph."""
    done = subprocess.run([sys.executable, "-c", TRACE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    sources = {
        path.relative_to(PROJECT).as_posix(): path.read_text("utf-8")
        for path in (PROJECT / "src/lockstep").rglob("*.py")
    }
    graph = SourceGraph(sources, sources)
    path_of = {path[4:-3].removesuffix("/__init__").replace("/", "."): path for path in sources}
    edges = [(importer, name) for importer, name in json.loads(done.stdout) if name in path_of]
    assert len(edges) > 500
    direct = {name: graph.dependents([path_of[name]]) for name in {name for _, name in edges}}
    missing = [edge for edge in edges if direct[edge[1]].get(path_of[edge[0]]) not in (0, 1)]
    assert missing == []
