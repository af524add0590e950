"""Risks, public names, cover and the page of a review, each on a small repository with one thing planted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from affected_project import SmallProject

from lockstep.ci.affected.page import markdown
from lockstep.ci.affected.repository import RepositoryError
from lockstep.ci.affected.symbols import changed_symbols, public_symbols, same_code
from lockstep.ci.registry import RegistryError
from lockstep.core.errors import ConfigError

pytestmark = pytest.mark.suite("cpu", seconds=5)

SCALE = "src/lockstep/ops/scale"
APP_TEST = "tests/server/test_app.py"
SINCE = 'disabled="flaky", issue="https://example.org/1", since="2026-01-31"'


@pytest.fixture
def project(tmp_path: Path) -> SmallProject:
    return SmallProject(tmp_path)


def test_nothing_changed(project: SmallProject) -> None:
    found = project.review()
    assert found.changes == () and found.suites == () and found.risks == ()
    assert "Nothing differs" in markdown(found)


def test_a_kernel_verified_nowhere_is_a_risk(project: SmallProject) -> None:
    project.append(f"{SCALE}/kernels/rare.py", "x = 1\n")
    assert project.risks() == ["kernel scale.rare changed, verified on: none"]


def test_a_kernel_is_changed_by_what_it_computes_with(project: SmallProject) -> None:
    project.replace(f"{SCALE}/programs.py", "return x", "return x + 1")
    assert project.risks() == [
        "kernel scale.rare changed, verified on: none",
        "kernel scale.fast changed, verified on: A card, before this change",
    ]


def test_a_kernel_says_where_it_was_verified_in_this_change(project: SmallProject) -> None:
    project.replace(f"{SCALE}/kernels/fast.py", "('A card',)", "('A card', 'Another')")
    assert project.risks() == ["kernel scale.fast changed, verified on: A card, Another (was: A card)"]


def test_compiled_code_changes_the_kernels_that_load_it(project: SmallProject) -> None:
    project.append("csrc/fast.cpp", "// more\n")
    assert project.risks() == ["kernel shift.native changed, verified on: cpu, before this change"]


def test_a_new_kernel(project: SmallProject) -> None:
    project.write(
        f"{SCALE}/kernels/new.py", project.text(f"{SCALE}/kernels/rare.py").replace('"rare"', '"new"')
    )
    assert "kernel scale.new is new, verified on: none" in project.risks()


def test_comments_docstrings_and_layout_are_no_risk(project: SmallProject) -> None:
    program = project.text(f"{SCALE}/programs.py").replace("return x", '"""Says."""\n\n    return (x)  # why')
    project.write(f"{SCALE}/programs.py", program)
    assert project.risks() == [] and project.review().covers == ()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("maths=LIMIT", "maths=9", "rounded(1, maths=LIMIT) -> rounded(1, maths=9)"),
        ("LIMIT = 1e-6", "LIMIT = 1e-3", "rounded(1, maths=LIMIT) -> rounded(1, maths=LIMIT)"),
        ("tolerance=rounded(1, maths=LIMIT), ", "", "rounded(1, maths=LIMIT) -> none"),
    ],
)
def test_a_tolerance_that_changes_is_a_risk(project: SmallProject, old: str, new: str, said: str) -> None:
    project.replace(f"{SCALE}/contract.py", old, new)
    assert project.risks() == [f"contract tolerance of scale changed: {said}"]


def test_a_mutant_that_need_not_be_rejected_any_more_is_a_risk(project: SmallProject) -> None:
    project.replace(f"{SCALE}/contract.py", '"one short": wrong, ', "")
    assert project.risks() == ["scale no longer has to reject the known-wrong version 'one short'"]


def test_gates_and_baselines_that_change_are_risks_and_new_ones_are_not(project: SmallProject) -> None:
    project.replace("src/lockstep/ci/gates/limit.py", "0.5", "0.1")
    project.replace("baselines/card.json", "{}", '{"decode": 1}')
    project.replace(".ci/run", "--min-accuracy 0.5", "--min-accuracy 0.1")
    project.write("src/lockstep/ci/gates/more.py", "LIMIT = 1\n")
    assert project.risks() == [
        "gate changed or removed in .ci/run: lockstep eval gsm8k --min-accuracy 0.5",
        "baseline changed: baselines/card.json",
        "gate changed: src/lockstep/ci/gates/limit.py",
    ]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('suite("cpu")', f'suite("cpu", {SINCE})', "test disabled (flaky): {file}::test_page"),
        ('suite("cpu")', 'suite("cpu", stage="nightly")', "test moved to nightly: {file}::test_page"),
        ('suite("cpu")', 'suite("cuda-1")', "test taken out of suite cpu: {file}::test_page"),
        ("def test_more(): ...", "", "test removed: {file}::test_more"),
        ("def test_more", "def nothing", "test removed: {file}::test_more"),
        ("def test_more", "@pytest.mark.skip\ndef test_more", "test disabled: 1 more skips or expected"),
        (
            "def test_more",
            "@pytest.mark.xfail(reason='')\ndef test_more",
            "test disabled: 1 more skips or expected",
        ),
        ("def test_more(): ...", "def test_more(): pytest.skip('')", "test disabled: 1 more skips or expected"),
    ],
)
def test_a_test_that_runs_less_often_is_a_risk(project: SmallProject, old: str, new: str, said: str) -> None:
    project.replace(APP_TEST, old, new)
    assert any(risk.startswith(said.format(file=APP_TEST)) for risk in project.risks())


def test_a_deleted_test_file_is_a_risk_and_a_moved_test_is_none(project: SmallProject) -> None:
    project.git("mv", APP_TEST, "tests/server/test_page.py")
    assert project.risks() == []
    project.git("rm", "-q", "-f", "tests/server/test_page.py")
    assert [text.rpartition("::")[2] for text in project.risks()] == ["test_page", "test_more"]


def test_tests_that_run_more_often_are_no_risk(project: SmallProject) -> None:
    project.write(
        "tests/server/test_new.py", project.text(APP_TEST) + "@pytest.mark.skip\ndef test_new(): ...\n"
    )
    project.replace(APP_TEST, 'suite("cpu")', 'suite("cpu", "cuda-1")')
    project.append(APP_TEST, "def test_third(): ...\n")
    assert project.risks() == []


def test_cover_names_the_nearest_test_and_code_that_none_runs(project: SmallProject) -> None:
    for path in ("core/clock.py", "server/orphan.py", "cli/eval.py", "layers/norm.py"):
        project.append(f"src/lockstep/{path}", "x = 1\n")
    found = project.review()
    cover = {each.path.removeprefix("src/lockstep/"): each for each in found.covers}
    assert [each.path for each in found.untested] == ["src/lockstep/server/orphan.py"]
    clock = cover["core/clock.py"]
    assert (clock.num_tests, clock.nearest, clock.steps) == (2, "tests/engine/test_worker.py", 2)
    assert not clock.by_registry
    assert cover["cli/eval.py"].by_registry and cover["cli/eval.py"].nearest == "tests/cli/test_main.py"
    assert cover["layers/norm.py"].steps == 4
    page = markdown(found)
    assert "No test runs: `src/lockstep/server/orphan.py`" in page
    assert "Only a registry finds: `src/lockstep/cli/eval.py`" in page


def suites_of(project: SmallProject) -> dict[str, set[str]]:
    return {suite.name: set(suite.files) for suite in project.review().suites}


def test_a_kernel_touches_the_suites_of_platforms_that_can_bind_it(project: SmallProject) -> None:
    parity = "tests/ops/test_parity.py"
    project.append(f"{SCALE}/kernels/fast.py", "x = 1\n")
    assert suites_of(project) == {"cuda-1": {parity}}
    project.git("checkout", "-q", ".")
    project.append(f"{SCALE}/kernels/rare.py", "x = 1\n")
    assert suites_of(project) == {"cpu": {parity, "tests/engine/test_llm.py", "tests/cli/test_main.py"}}
    project.append(f"{SCALE}/programs.py", "x = 1\n")
    assert set(suites_of(project)) == {"cpu", "cuda-1"}, (
        "what several kernels compute with is of every platform"
    )


@pytest.mark.parametrize(
    "text",
    ['PROVIDER = "fast"\nfrom lockstep.ops.registry import kernels', "import lockstep.ops.scale.kernels.fast"],
)
def test_who_names_a_kernel_is_touched_wherever_it_runs(project: SmallProject, text: str) -> None:
    project.append("tests/server/test_app.py", f"{text}\n")
    project.commit()
    project.git("tag", "-f", "base")
    project.append(f"{SCALE}/kernels/fast.py", "x = 1\n")
    assert suites_of(project)["cpu"] == {"tests/server/test_app.py"}


def test_a_registry_covers_a_kernel_only_where_it_can_be_bound(project: SmallProject) -> None:
    project.append(f"{SCALE}/kernels/fast.py", "x = 1\n")
    assert [cover.num_tests for cover in project.review().covers] == [1] and not project.review().untested
    project.replace("tests/ops/test_parity.py", '"cpu", "cuda-1"', '"cpu"')
    assert [cover.path for cover in project.review().untested] == [f"{SCALE}/kernels/fast.py"]


def test_gates_cover_what_their_command_needs(project: SmallProject) -> None:
    project.append("src/lockstep/models/llm/apple.py", "x = 1\n")
    assert project.review().gates == ("accuracy",)
    project.git("checkout", "-q", ".")
    project.append("src/lockstep/server/app.py", "x = 1\n")
    assert project.review().gates == ()


def test_public_names() -> None:
    text = """
LIMIT = 3
SIZE: int = 4
_hidden = 1
class Box(Base, total=False):
    width: int
    height: int = 2
    _secret: str
    def __init__(self, width: int) -> None: ...
    @property
    def area(self) -> int: ...
    def _own(self): ...
    class Part: ...
class _Private:
    def seen(self): ...
async def fetch(url: str, *, tries: int = 3) -> bytes:
    def inner(): ...
"""
    assert public_symbols(text) == {
        "LIMIT": "constant",
        "SIZE": "int",
        "Box": "class(Base, total=False)",
        "Box.width": "int",
        "Box.height": "int = 2",
        "Box.__init__": "(self, width: int) -> None",
        "Box.area": "property (self) -> int",
        "Box.Part": "class",
        "fetch": "async (url: str, *, tries: int=3) -> bytes",
    }
    assert public_symbols("not python (") == {}


def test_changed_names_and_those_that_no_test_uses(project: SmallProject) -> None:
    project.replace("src/lockstep/core/clock.py", "now_s() -> float", "now_s(zone: str) -> float")
    project.append("src/lockstep/core/clock.py", "def later() -> int: ...\ndef ask() -> int: ...\n")
    project.replace("src/lockstep/server/orphan.py", "alone", "lonely")
    found = project.review()
    assert {(symbol.name, symbol.before, symbol.after) for symbol in found.symbols} == {
        ("now_s", "() -> float", "(zone: str) -> float"),
        ("later", None, "() -> int"),
        ("ask", None, "() -> int"),
        ("alone", "() -> None", None),
        ("lonely", None, "() -> None"),
    }
    assert {symbol.name for symbol in found.unnamed} == {"later", "lonely"}
    page = markdown(found)
    assert "- **changed** `now_s` `() -> float` to `(zone: str) -> float`" in page
    assert "- **removed** `alone`" in page and "- added `lonely`" in page


def test_same_code_is_decided_by_the_syntax_tree() -> None:
    assert same_code("x = 1", '"""Doc."""\nx = (1)  # why')
    assert not same_code("x = 1", "x = 2") and not same_code("x = '1'", "x = '2'")
    assert same_code("broken (", "broken (") and not same_code("broken (", "broken ((")
    assert changed_symbols("a.py", "def f(): ...", "def f():\n    return 1") == []


def test_the_page_is_short_and_the_json_has_everything(project: SmallProject) -> None:
    project.append("src/lockstep/core/clock.py", "".join(f"def later{n}() -> int: ...\n" for n in range(60)))
    project.append("pyproject.toml", "\n")
    found = project.review()
    page, data = markdown(found), json.loads(json.dumps(found.as_json()))
    assert len(page.splitlines()) < 90 and "and 20 more" in page
    assert len(data["symbols"]) == 60 and data["everything"] == ["pyproject.toml"]
    assert data["rooms"]["core"] == {"files": 1, "added": 60, "removed": 0}
    assert [suite["name"] for suite in data["suites"]] == ["cpu", "cuda-1"]
    assert "| core | 1 | 60 | 0 | `clock.py` |" in page
    assert "Everything, because of `pyproject.toml`." in page
    assert "| cpu | per-commit, nightly | 5 of 5 |" in page


def test_bad_bases_and_projects_are_explained(project: SmallProject, tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="no such commit: v9"):
        project.review("v9")
    with pytest.raises(RepositoryError, match=r"no such commit: --output=x"):
        project.review("--output=x")
    project.git("checkout", "-q", "--orphan", "island")
    project.append("README.md")
    project.commit()
    with pytest.raises(RepositoryError, match="main and this checkout share no commit"):
        project.review("main")
    project.git("checkout", "-q", "main")
    project.replace(APP_TEST, 'pytestmark = pytest.mark.suite("cpu")', "")
    with pytest.raises(RegistryError, match="belongs to no suite"):
        project.review()
    project.write("pyproject.toml", "")
    with pytest.raises(ConfigError, match=r"lockstep\.testing"):
        project.review()


def test_outside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lockstep.ci.affected.review import review

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(RepositoryError, match="not a git repository"):
        review(tmp_path, "main")
