"""What a platform must say, and what happens when it does not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lockstep.core.capabilities import Capabilities
from lockstep.core.errors import ConfigError, LockstepError
from lockstep.platforms import registry
from lockstep.platforms.accelerator import TorchAccelerator
from lockstep.platforms.base import MemoryFacts, Platform, PlatformError
from lockstep.platforms.registry import load_platform, pick_platform, platform_names

pytestmark = pytest.mark.suite("cpu")

FACTS: dict[str, Any] = {
    "name": "made_up",
    "device_type": "cpu",
    "kernel_preference": ("torch",),
    "attention_preference": ("torch",),
}
METHODS: dict[str, Any] = {
    "unavailable_reason": lambda self: None,
    "capabilities": lambda self: Capabilities(platform="made_up", device_type="cpu", device_name="made up"),
    "memory": lambda self, index=0: MemoryFacts(2, 1),
    "device": lambda self, index=0: torch.device("cpu"),
    "synchronize": lambda self: None,
}


def define(**body: Any) -> type[Platform]:
    return type("MadeUpPlatform", (Platform,), body)


@pytest.mark.parametrize("missing", [*FACTS, *METHODS])
def test_a_platform_that_lacks_something_cannot_be_defined(missing: str) -> None:
    body = FACTS | METHODS
    del body[missing]
    with pytest.raises(PlatformError) as raised:
        define(**body)
    said = f"{missing}()" if missing in METHODS else missing
    assert f"MadeUpPlatform lacks {said};" in str(raised.value)


def test_everything_that_is_missing_is_named_at_once() -> None:
    with pytest.raises(PlatformError) as raised:
        define(name="made_up")
    assert all(name in str(raised.value) for name in (*FACTS, *METHODS) if name != "name")


@pytest.mark.parametrize(("fact", "value"), [("kernel_preference", "torch"), ("name", None)])
def test_a_fact_of_the_wrong_kind_is_refused(fact: str, value: object) -> None:
    with pytest.raises(PlatformError, match=f"MadeUpPlatform.{fact} must be a "):
        define(**FACTS | METHODS | {fact: value})


def test_what_is_not_stated_is_no() -> None:
    platform = define(**FACTS | METHODS)()
    stated = platform.capabilities()
    assert not (stated.has_graphs or stated.has_streams or stated.has_triton or stated.features)
    assert stated.collective_backend is None
    assert platform.new_stream() is None
    with pytest.raises(PlatformError, match="made_up has no graphs"):
        platform.new_graph()


def test_an_abstract_base_need_not_be_complete() -> None:
    class Half(Platform, abstract=True):
        device_type = "cpu"

    with pytest.raises(PlatformError, match="Whole lacks"):
        type("Whole", (Half,), {})


@pytest.mark.parametrize("name", platform_names())
def test_platforms_agree_with_their_own_records(name: str) -> None:
    platform = load_platform(name)
    assert platform.name == name
    assert platform.unavailable_reason() is None or "\n" not in str(platform.unavailable_reason())
    if platform.unavailable_reason() is None:
        stated = platform.capabilities()
        assert (stated.platform, stated.device_type) == (name, platform.device_type)
        assert platform.device().type == platform.device_type
        facts = platform.memory()
        assert 0 < facts.available_bytes <= facts.total_bytes


def test_vendors_do_not_share_a_list() -> None:
    cuda, rocm, musa = (load_platform(name).kernel_preference for name in ("cuda", "rocm", "musa"))
    portable = {"triton", "torch", "reference"}
    assert set(rocm) - portable == {"aiter"} and set(musa) - portable == {"musa"}
    assert not set(cuda) & {"aiter", "musa"}
    assert not issubclass(type(load_platform("rocm")), type(load_platform("cuda")))


def test_an_unknown_platform_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'rocm'"):
        load_platform("rocn")


def test_absent_devices_say_why() -> None:
    for name in ("rocm", "musa"):
        with pytest.raises(ConfigError, match=f"--device {name} cannot be used: .*(ROCm|torch_musa|GPU)"):
            pick_platform(name)


def _fail_for(name: str) -> Callable[..., None]:
    """A finder of modules that raises for one of them what a vendor's library may."""

    def find_spec(asked: str, *where: object) -> None:
        if asked == name:
            raise OSError("no driver")

    return find_spec


def test_a_platform_from_outside_is_never_picked_for_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = define(**FACTS | METHODS)
    point = SimpleNamespace(name="made_up", value="", dist=None, load=lambda: offered)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    monkeypatch.setattr(registry, "_AUTOMATIC", ("rocm", "cpu"))
    assert pick_platform("auto").name == "cpu"
    assert pick_platform("made_up").name == "made_up"


def offer(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    point = EntryPoint("made_up", value, registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("no.such.module:Thing", "cannot be imported: No module named 'no'"),
        ("antigravity_of_tests:Thing", "cannot be imported: no driver"),
        ("math:pi", "is 3.14.*, not a Platform class"),
        ("lockstep.platforms.cpu:CpuPlatform", "offers platform 'cpu' under the name 'made_up'"),
    ],
)
def test_a_package_that_offers_something_else_is_named(
    value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = SimpleNamespace(find_spec=_fail_for("antigravity_of_tests"))
    monkeypatch.setattr(sys, "meta_path", [broken, *sys.meta_path])
    offer(monkeypatch, value)
    assert "made_up" in platform_names()
    with pytest.raises(LockstepError, match=said):
        load_platform("made_up")


def test_an_accelerator_answers_through_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's own module stands in for a vendor's, with the functions that it lacks."""
    released: list[str] = []
    monkeypatch.setattr(torch.cpu, "mem_get_info", lambda index: (3, 5 + index), raising=False)
    monkeypatch.setattr(torch.cpu, "memory_reserved", lambda index: index, raising=False)
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: released.append("cache"), raising=False)
    body = {**FACTS, **{name: METHODS[name] for name in ("unavailable_reason", "capabilities")}}
    platform = type("OnTorchCpu", (TorchAccelerator,), body)()
    assert platform.memory(2) == MemoryFacts(total_bytes=7, available_bytes=3, held_bytes=2)
    free = iter((10, 4))
    monkeypatch.setattr(torch.cpu, "mem_get_info", lambda index: (next(free), 10))
    with platform.memory_use() as use:
        assert use.bytes == 0
    assert use.bytes == 6
    platform.release_unused()
    assert released == ["cache"]
    assert platform.new_stream() is None
    platform.synchronize()
