"""A platform package made from the skeleton, installed, and judged by its own tests; nothing here is changed for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.cli.main import main
from lockstep.core.errors import ConfigError
from lockstep.ops.registry import contracts, kernels
from lockstep.platforms.registry import platform_names
from lockstep.platforms.skeleton import write_skeleton

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


def test_it_is_used_where_it_is_named_and_nowhere_else(environment: dict[str, str]) -> None:
    """It could be used, which does not make it anybody's default."""
    without = {name: value for name, value in environment.items() if name != "LOCKSTEP_DEVICE"}
    explain = [*COMMAND, "explain", "config", "--json"]
    found = subprocess.run(explain, env=without, capture_output=True, text=True, timeout=120)
    device = next(each for each in json.loads(found.stdout) if each["name"] == "device")
    assert device["value"] != "toy_card" and "toy_card of other packages only where named" in device["why"]
    named = subprocess.run(
        [*explain, "--device", "toy_card"], env=without, capture_output=True, text=True, timeout=120
    )
    device = next(each for each in json.loads(named.stdout) if each["name"] == "device")
    assert (device["value"], device["why"]) == ("toy_card", "--device")


def test_a_broken_package_of_kernels_leaves_other_runs_alone(
    package: Path, environment: dict[str, str]
) -> None:
    kernels = next((package.parent / "site").rglob("lockstep_toy_card/kernels.py"))
    right = kernels.read_text()
    kernels.write_text("import no_such_library\n")
    try:
        command = [*COMMAND, "ops", "explain", "--device", "cpu", "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    finally:
        kernels.write_text(right)
    assert done.returncode == 0 and json.loads(done.stdout)
    assert done.stderr.count("\n") == 1
    assert "the kernels of package lockstep-toy_card are left out" in done.stderr.replace(
        "toy-card", "toy_card"
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cuda", "there is a platform 'cuda' already"),
        ("Toy", "cannot name a platform"),
        ("a-b", "cannot name"),
        ("auto", "it is a word of --device"),
        ("engine", "it is the name of this project's own package"),
        ("native_avx2", "it is what kernels of this project are called"),
    ],
)
def test_names_that_cannot_be(name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["platform", "new", name, "--path", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_no_platform_is_called_what_kernels_are(tmp_path: Path) -> None:
    providers = {kernel.provider for op in contracts() for kernel in kernels(op)}
    for provider in sorted(providers):
        with pytest.raises(ConfigError, match=r"cannot name a platform|already"):
            write_skeleton(provider, tmp_path)
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
