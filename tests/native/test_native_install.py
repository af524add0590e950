"""Real installations of a copy of the project: with no compiler in sight, and editable with one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.suite("cpu", seconds=60, stage="nightly")

PROJECT = Path(__file__).parents[2]
PARTS = ("src", "csrc", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", ".gitignore")
BUILT = shutil.ignore_patterns("*.so", "__pycache__", "not_built.txt")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project as a fresh clone has it."""
    copy = tmp_path / "project"
    for part in PARTS:
        source = PROJECT / part
        copied = shutil.copytree(source, copy / part, ignore=BUILT) if source.is_dir() else copy / part
        if source.is_file():
            shutil.copyfile(source, copied)
    return copy


@pytest.fixture
def no_compiler(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH has the tools of a build, and no compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("cmake", "ninja", "make"):
        found = shutil.which(tool)
        if found:
            (folder / tool).symlink_to(found)
    kept = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    return {**kept, "PATH": str(folder)}


def run(*command: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    done = subprocess.run(
        list(map(str, command)), env=env, cwd=cwd, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_without_a_compiler_the_package_installs_and_says_so(
    project: Path, no_compiler: dict[str, str], tmp_path: Path
) -> None:
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path / "wheels", project, env=no_compiler)
    (wheel,) = (tmp_path / "wheels").iterdir()
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    assert not list(site.rglob("*.so"))
    assert sorted(path.relative_to(site) for path in site.rglob("*.py")) == sorted(
        path.relative_to(project / "src") for path in (project / "src").rglob("*.py")
    )
    printed = run(
        *(sys.executable, "-m", "lockstep.cli.main", "ops", "list"),
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=tmp_path,
    )
    assert printed.splitlines()[-1] == "no native kernels (not built: no C++ compiler)"


def test_an_editable_install_sees_new_files_and_builds_beside_its_sources(
    project: Path, tmp_path: Path
) -> None:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("this machine has no C++ compiler")
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    run(python, "-m", "pip", "install", "--no-deps", "-e", project)
    (project / "src" / "lockstep" / "appeared.py").write_text("ANSWER = 42\n")
    code = (
        "import importlib.resources as resources, lockstep, lockstep.native, lockstep.appeared\n"
        "assert lockstep.native.extension(), lockstep.native.why_not()\n"
        "assert 'lockstep.native._native' == lockstep.native.extension().__name__\n"
        "assert resources.files('lockstep.server').joinpath('static/index.html').read_text()\n"
        "print(lockstep.appeared.ANSWER, *lockstep.__path__)"
    )
    assert run(python, "-c", code, cwd=tmp_path).split() == ["42", str(project / "src" / "lockstep")]
    assert (tmp_path / "venv" / "bin" / "lockstep").exists()
    assert len(list((project / "src" / "lockstep" / "native").glob("_native*.so"))) == 1

    (kernels,) = (project / "build").glob("*/csrc/CMakeFiles/lockstep_kernels.dir")
    compiled = {path: path.stat().st_mtime_ns for path in kernels.rglob("*.o")}
    run(python, "-m", "pip", "install", "--no-deps", "-e", project)
    assert compiled == {path: path.stat().st_mtime_ns for path in kernels.rglob("*.o")} != {}
