"""Which kernel a call site gets, why, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lockstep.core.capabilities import Capabilities
from lockstep.core.errors import KernelError
from lockstep.ops import selection
from lockstep.ops.contract import Kernel, Signature
from lockstep.ops.registry import contracts, kernels
from lockstep.ops.selection import Binding, KernelSelector, passed_over, require_served

pytestmark = pytest.mark.suite("cpu")

HERE = Capabilities(platform="here", device_type="cpu", device_name="a test", features=frozenset({"wings"}))
SIGNATURE: Signature = {"dtype": torch.float32, "width": 64, "weight_dtype": torch.float32}


def too_wide(signature: Signature) -> str | None:
    return "only up to 32" if signature["width"] > 32 else None


def never_called(*arguments: Any) -> None:
    raise AssertionError("selection runs no kernel")


def kernel(provider: str, **fields: Any) -> Kernel:
    return Kernel(op="rms_norm", provider=provider, function=never_called, **fields)


OFFERED = (
    kernel("reference"),
    kernel("narrow", refuses=too_wide),
    kernel("elsewhere", platforms=frozenset({"there"})),
    kernel("gilled", features=frozenset({"wings", "gills"})),
    kernel("good", platforms=frozenset({"here", "there"}), features=frozenset({"wings"})),
)


@pytest.fixture(autouse=True)
def offered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """rms_norm has the kernels above; other operators what the registry finds."""
    monkeypatch.setattr(selection, "kernels", lambda op: OFFERED if op == "rms_norm" else kernels(op))
    yield


def bind(*preference: str, **options: Any) -> Binding:
    return KernelSelector(HERE, preference, **options).bind("rms_norm", "model.norm", SIGNATURE)


def test_the_first_that_accepts_is_bound_and_the_others_say_why_not() -> None:
    found = bind("narrow", "elsewhere", "gilled", "good")
    assert found.kernel.provider == "good" and found.why == "first that accepts"
    assert found.op == "rms_norm" and found.where == "model.norm" and found.function is never_called
    assert dict(found.refused) == {
        "narrow": "only up to 32",
        "elsewhere": "made for there, not here",
        "gilled": "the device lacks gills",
    }


def test_preference_orders_and_reference_comes_last_unless_listed() -> None:
    assert bind("good", "reference").why == "first in this platform's preference"
    assert bind("reference", "good").kernel.provider == "reference"
    assert bind("elsewhere", only=True).kernel.provider == "reference"
    unheard = bind("unheard_of", "good")
    assert unheard.kernel.provider == "good"
    assert unheard.why == "first that this operator has of this platform's preference"


def test_a_kernel_that_no_preference_names_comes_before_torch_and_the_reference() -> None:
    found = bind("narrow", "torch", "reference")
    assert found.kernel.provider == "good" and dict(found.refused).keys() == {"narrow", "gilled"}
    alone = KernelSelector(HERE, ("torch",)).bind("rms_norm", "norm", {**SIGNATURE, "width": 16})
    assert (alone.kernel.provider, alone.why.partition(",")[0]) == (
        "narrow",
        "named by no preference of this platform",
    )
    assert bind("torch", only=True).kernel.provider == "reference"


def test_a_kernel_asked_for_by_name_alone_is_bound_no_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    shy = kernel("shy", by_name=True)
    monkeypatch.setattr(selection, "kernels", lambda op: (OFFERED[0], shy))
    assert bind("torch").kernel.provider == "reference"
    assert bind("torch", forced={"rms_norm": "shy"}).kernel is shy


def test_every_other_kernel_has_a_reason() -> None:
    assert dict(passed_over(bind("narrow", "good"), HERE)) == {
        "narrow": "only up to 32",
        "reference": "good is bound",
        "elsewhere": "made for there, not here",
        "gilled": "the device lacks gills",
    }


def test_what_was_forced_and_serves_nothing_is_an_error() -> None:
    bound = [bind("good")]
    require_served({"rms_norm": "good"}, bound)
    require_served({"*": "good"}, bound)
    with pytest.raises(
        KernelError, match=r"linear=torch would change nothing: .*no call of linear.*has rms_norm"
    ):
        require_served({"linear": "torch"}, bound)
    with pytest.raises(KernelError, match=r"\*=torch would change nothing: .*no operator with a kernel torch"):
        require_served({"*": "torch"}, bound)
    inside = bound[0].inside(Binding("decoder_forward", "all", kernel("native"), ""))
    assert (inside.kernel.provider, inside.why) == ("decoder_forward.native", "inside decoder_forward.native")
    with pytest.raises(KernelError, match="rms_norm=good would change nothing"):
        require_served({"rms_norm": "good"}, [inside])


def test_a_signature_decides() -> None:
    chosen = KernelSelector(HERE, ("narrow", "good")).bind("rms_norm", "head", {**SIGNATURE, "width": 16})
    assert chosen.kernel.provider == "narrow"


@pytest.mark.parametrize("forced", [{"rms_norm": "good"}, {"*": "good"}, {"*": "narrow", "rms_norm": "good"}])
def test_forced(forced: dict[str, str]) -> None:
    found = bind("reference", forced=forced)
    assert found.kernel.provider == "good" and found.why == "forced by --force-kernel rms_norm=good"


def test_a_forced_kernel_that_refuses_is_an_error() -> None:
    with pytest.raises(KernelError, match=r"rms_norm=narrow cannot serve model\.norm: only up to 32"):
        bind("good", forced={"rms_norm": "narrow"})
    with pytest.raises(KernelError, match="lacks gills"):
        bind("good", forced={"*": "gilled"})


def test_a_star_leaves_operators_alone_that_have_no_such_kernel() -> None:
    selector = KernelSelector(HERE, ("torch",), forced={"*": "good"})
    assert (
        selector.bind("silu_and_mul", "mlp", {"dtype": torch.float32, "width": 64}).kernel.provider == "torch"
    )


@pytest.mark.parametrize(
    ("forced", "says"),
    [
        ({"rms_nrom": "good"}, r"unknown operator 'rms_nrom'; did you mean 'rms_norm'\?"),
        (
            {"rms_norm": "goood"},
            r"rms_norm=goood names no kernel; did you mean 'good'\? \(known: reference, narrow,",
        ),
        ({"*": "refrence"}, r"\*=refrence names no kernel; did you mean 'reference'\?"),
        ({"linear": "good"}, r"linear=good names no kernel.*known: reference, cuda, native, .*onednn, torch"),
    ],
)
def test_unknown_forced_names(forced: dict[str, str], says: str) -> None:
    with pytest.raises(KernelError, match=says):
        KernelSelector(HERE, ("good",), forced=forced)


def test_strict_refuses_fallbacks_but_not_what_was_never_for_this_platform() -> None:
    with pytest.raises(
        KernelError, match=r"--strict-kernels: rms_norm\.narrow refuses model\.norm: only up to 32"
    ):
        bind("narrow", "good", strict=True)
    with pytest.raises(KernelError, match="lacks gills"):
        bind("gilled", "good", strict=True)
    assert bind("elsewhere", "good", strict=True).kernel.provider == "good"
    assert bind("good", "narrow", strict=True).kernel.provider == "good"


def test_nothing_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "kernels", lambda op: OFFERED[1:4])
    with pytest.raises(KernelError, match=r"no kernel of 'rms_norm' can serve model\.norm \(narrow: .*gills\)"):
        bind("narrow", "elsewhere", "gilled")


@pytest.mark.parametrize(
    ("op", "signature", "says"),
    [
        ("rms_nrm", SIGNATURE, r"unknown operator 'rms_nrm'; did you mean 'rms_norm'\?"),
        ("rms_norm", {**SIGNATURE, "widht": 1}, r"no signature entry 'widht'; did you mean 'width'\?"),
        ("rms_norm", {"dtype": torch.float32}, "without width"),
    ],
)
def test_wrong_call_sites(op: str, signature: Signature, says: str) -> None:
    with pytest.raises(KernelError, match=says):
        KernelSelector(HERE, ("good",)).bind(op, "here", signature)


def test_every_decision_is_remembered() -> None:
    selector = KernelSelector(HERE, ("good", "torch"))
    for where in ("a", "b"):
        selector.bind("rms_norm", where, SIGNATURE)
    selector.bind("gelu_and_mul", "c", {"dtype": torch.float32, "width": 64, "tanh": True})
    assert [(each.op, each.where, each.kernel.provider) for each in selector.bindings] == [
        ("rms_norm", "a", "good"),
        ("rms_norm", "b", "good"),
        ("gelu_and_mul", "c", "torch"),
    ]


def test_the_registry_names_the_nearest_operator() -> None:
    with pytest.raises(KernelError, match=r"unknown operator 'kv_stor'; did you mean 'kv_store'\?"):
        kernels("kv_stor")
    assert set(contracts()) >= {"rms_norm", "add_rms_norm", "linear", "rope", "kv_store", "attention_decode"}
