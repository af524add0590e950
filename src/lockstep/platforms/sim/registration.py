"""Telling torch about the simulated device. Torch keeps one such device a process, for the life of the process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from lockstep.platforms.base import PlatformError
from lockstep.platforms.printed_devices import make_printed_devices_importable
from lockstep.platforms.sim import operators

_KEY = "PrivateUse1"
_lock = threading.Lock()
_libraries: list[torch.library.Library] = []


def register() -> None:
    """Makes torch.device("sim") usable. Does nothing the second time.

    Raises PlatformError when another package has taken torch's one place for a foreign device.
    """
    with _lock:
        if not _libraries:
            _register()


class _DeviceModule:
    """torch.sim: what torch asks of the module that carries a device's name. Random numbers are the host's."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def synchronize(self, device: object = None) -> None:
        """Operators on the host have run when they return."""

    def manual_seed_all(self, seed: int) -> None:
        """torch.manual_seed has seeded the host's generator by itself."""

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)


def _register() -> None:
    taken = torch._C._get_privateuse1_backend_name()
    if taken != "privateuseone":
        raise PlatformError(
            f"torch's one place for a foreign device is taken by {taken!r}; use a fresh process"
        )
    _setup_privateuseone_for_python_backend(operators.DEVICE_TYPE, backend_module=_DeviceModule())
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(operators.run_on_host, _KEY)
    aten = torch.library.Library("aten", "IMPL")
    for name in (*_past_modes(), *_with_formulas()):
        aten.impl(name, partial(operators.run_on_host, _operator(name)), _KEY)
    aten.impl("as_strided", operators.as_strided, _KEY)
    aten.impl("_copy_from", operators.copy_from, _KEY)
    aten.impl("resize_", operators.resize_, _KEY)
    aten.impl("_pin_memory", operators.PinMemory(), "CPU", with_keyset=True)
    make_printed_devices_importable()
    _libraries.extend((everything, aten))


def _past_modes() -> tuple[str, ...]:
    """Operators that torch.tensor() calls past the active dispatch modes, where torch does not find a fallback."""
    return "empty.memory_format", "empty_strided"


def _with_formulas() -> Iterator[str]:
    """Operators for which torch has a kernel on the host and, for devices without one, a formula that rounds more."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in torch._C._dispatch_get_all_op_names():
        if (
            name.startswith("aten::")
            and has_kernel(name, "CPU")
            and has_kernel(name, "CompositeExplicitAutograd")
        ):
            yield name.removeprefix("aten::")


def _operator(name: str) -> torch._ops.OpOverload:
    """Such as torch.ops.aten.empty.memory_format of "empty.memory_format"."""
    packet, _, overload = name.partition(".")
    found: torch._ops.OpOverload = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return found
