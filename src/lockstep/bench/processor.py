"""What tells two processors apart that have one name: a virtual machine may call very different ones "AMD EPYC"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_NUMBERS = ("cpu family", "model", "stepping")
_CPUINFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_BOARD = Path("/sys/class/dmi/id")


def processor_details() -> dict[str, Any]:
    """Family, model and stepping, whether a hypervisor is below, the caches of the first core and the machine's type.

    As JSON types, from Linux's own files; what the system does not tell is left out. Nothing in it changes while the
    machine stays the same.
    """
    facts = _first_processor()
    details: dict[str, Any] = {name: int(facts[name]) for name in _NUMBERS if facts.get(name, "").isdecimal()}
    if "flags" in facts:
        details["hypervisor"] = "hypervisor" in facts["flags"].split()
    if caches := [_cache(folder) for folder in sorted(_CACHES.glob("index*"))]:
        details["caches"] = caches
    if board := " ".join(filter(None, (_text(_BOARD / name) for name in ("sys_vendor", "product_name")))):
        details["board"] = board
    return details


def _first_processor() -> dict[str, str]:
    lines = _text(_CPUINFO).partition("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _cache(folder: Path) -> str:
    """Such as "L1 Data 48K"."""
    level, kind, size = (_text(folder / name) for name in ("level", "type", "size"))
    return f"L{level} {kind} {size}"


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
