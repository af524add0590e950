"""A platform package made from the skeleton, installed, and judged by its own tests; nothing here is changed for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.cli.main import main
from lockstep.platforms.registry import platform_names

pytestmark = pytest.mark.suite("cpu")

COMMAND = [sys.executable, "-m", "lockstep.cli.main"]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("outside")
    assert main(["platform", "new", "toy_card", "--path", str(directory)]) == 0
    return directory / "lockstep-toy_card"


@pytest.fixture(scope="module")
def environment(package: Path) -> dict[str, str]:
    """An environment in which the package is installed, in a directory of its own."""
    target = package.parent / "site"
    install = ["install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", *install, str(package)], check=True, timeout=120)
    paths = [str(target), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def test_the_package_passes_its_own_tests(package: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(package)]
    done = subprocess.run(command, env=environment, cwd=package, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_a_wrong_kernel_fails_its_tests(package: Path, environment: dict[str, str]) -> None:
    """The installed copy is what runs: an eps that is off must be seen."""
    kernels = next((package.parent / "site").rglob("lockstep_toy_card/kernels.py"))
    right = kernels.read_text()
    kernels.write_text(right.replace("+ eps)", "+ 2 * eps)"))
    try:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "rms_norm",
            str(package),
        ]
        done = subprocess.run(
            command, env=environment, cwd=package, capture_output=True, text=True, timeout=120
        )
    finally:
        kernels.write_text(right)
    assert done.returncode == 1 and "out is off by" in done.stdout


def test_commands_know_it(environment: dict[str, str]) -> None:
    listed = subprocess.run(
        [*COMMAND, "ops", "list", "--json"], env=environment, capture_output=True, text=True, timeout=120
    )
    by_name = {each["op"]: [kernel["name"] for kernel in each["kernels"]] for each in json.loads(listed.stdout)}
    assert "toy_card" in by_name["rms_norm"]
    wrong = subprocess.run(
        [*COMMAND, "run", "--device", "toy_cart", "x"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert wrong.returncode == 2 and "did you mean 'toy_card'" in wrong.stderr
    assert "toy_card" not in platform_names()


@pytest.mark.parametrize(
    ("name", "said"),
    [("cuda", "there is a platform 'cuda' already"), ("Toy", "cannot name a platform"), ("a-b", "cannot name")],
)
def test_names_that_cannot_be(name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["platform", "new", name, "--path", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["platform", "new", "toy", "--path", str(tmp_path), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    Path(written[0]).write_text("mine")
    assert main(["platform", "new", "toy", "--path", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert Path(written[0]).read_text() == "mine"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["platform", "new", "toy", "--path", str(tmp_path / "file" / "deeper")]) == 2
    assert "cannot be written" in capsys.readouterr().err
