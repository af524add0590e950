"""A processor that lacks a feature is never offered an instruction set that was compiled with it."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path
from platform import machine
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.cli.main import main
from lockstep.config.environment import disabled_features
from lockstep.core.errors import ConfigError
from lockstep.native import FEATURES, extension, features, usable_instruction_sets

pytestmark = pytest.mark.suite("cpu", seconds=3)

BUILD = Path(__file__).parents[2] / "csrc" / "CMakeLists.txt"
FLAGS = {
    **{f"-m{name}": name for name in ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl")},
    "-mavx512vnni": "avx512_vnni",
    "-mavx512bf16": "avx512_bf16",
    "-mavxvnni": "avx_vnni",
    **{f"-mamx-{name}": f"amx_{name}" for name in ("tile", "int8", "bf16")},
}
"""Compiler flags of x86 and what Linux calls the same feature."""

ARM_FLAGS = {"-march=armv8.2-a+dotprod": {"asimd", "asimddp"}}


def compiled_with() -> dict[str, set[str]]:
    """Instruction set to the features that the build lets the compiler use in its files."""
    needs: dict[str, set[str]] = {"scalar": set()}
    for name, flags in re.findall(r"set\((\w+)_flags (.+)\)", BUILD.read_text("utf-8")):
        needs[name] = set()
        for flag in flags.split():
            inherited = re.fullmatch(r"\$\{(\w+)_flags\}", flag)
            needs[name] |= needs[inherited[1]] if inherited else ARM_FLAGS.get(flag) or {FLAGS[flag]}
    return needs


NEEDS = compiled_with()


def cpuinfo_flags() -> set[str]:
    text = Path("/proc/cpuinfo").read_text("utf-8") if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()


def may_use_tiles() -> bool:
    """Whether the system grants this process AMX's tiles: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)."""
    if sys.platform != "linux" or machine() != "x86_64":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def test_the_build_was_read() -> None:
    assert set(NEEDS) == {"scalar", "avx2", "avx_vnni", "avx512", "avx512_bf16", "amx", "neon"}
    assert NEEDS["avx2"] < NEEDS["avx512"] < NEEDS["avx512_bf16"] < NEEDS["amx"] and len(NEEDS["avx2"]) == 3
    assert NEEDS["avx_vnni"] == NEEDS["avx2"] | {"avx_vnni"}
    assert set().union(*NEEDS.values()) <= set(FEATURES)


def test_features_are_those_of_cpuinfo(native: ModuleType) -> None:
    told = cpuinfo_flags()
    if not told & {"sse2", "asimd"}:
        pytest.skip("this system has no /proc/cpuinfo to compare with")
    usable = told if may_use_tiles() else {name for name in told if not name.startswith("amx_")}
    assert features() == usable & set(FEATURES)


@pytest.mark.parametrize("masked", FEATURES)
def test_nothing_on_offer_needs_a_masked_feature(masked: str, native: ModuleType) -> None:
    before, after = usable_instruction_sets(), usable_instruction_sets([masked])
    assert masked not in features([masked])
    assert [name for name in before if masked not in NEEDS[name]] == list(after)
    assert after[-1] == "scalar"


@given(st.sets(st.sampled_from(FEATURES)))
def test_on_offer_is_exactly_what_the_features_suffice_for(present: set[str]) -> None:
    """For processors that this machine is not, among the instruction sets that this build holds."""
    native = extension()
    if native is None:
        assert usable_instruction_sets() == ()
        return
    built = native.usable_instruction_sets(list(FEATURES))
    assert native.usable_instruction_sets(sorted(present)) == [name for name in built if NEEDS[name] <= present]


@given(st.sets(st.sampled_from(FEATURES)), st.sets(st.sampled_from(FEATURES)))
def test_disabling_only_removes(some: set[str], more: set[str]) -> None:
    assert features(some | more) <= features(some) <= features()
    assert set(usable_instruction_sets(some | more)) <= set(usable_instruction_sets(some))


def test_an_unknown_feature_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match="no processor feature is called 'avx512_bf61'; did you mean 'avx512_bf16'"
    ):
        features(["avx512_bf61"])


@pytest.mark.parametrize(
    ("text", "names"),
    [("", set()), (",", set()), ("avx2", {"avx2"}), (" avx512_bf16, avx2,", {"avx512_bf16", "avx2"})],
)
def test_the_environment_names_features_between_commas(text: str, names: set[str]) -> None:
    assert disabled_features({"LOCKSTEP_DISABLE_FEATURES": text}) == names
    assert disabled_features({}) == frozenset()


def test_the_command_line_obeys_the_environment(
    native: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCKSTEP_DISABLE_FEATURES", "avx2,asimd")
    assert main(["ops", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "native kernels: scalar"
    monkeypatch.setenv("LOCKSTEP_DISABLE_FEATURES", "avx3")
    assert main(["ops", "list"]) == 2
    assert capsys.readouterr().err.startswith("error: no processor feature is called 'avx3'")
