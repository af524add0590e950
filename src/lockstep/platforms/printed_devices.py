"""Printed graphs that name a device which torch learns of only when its platform is opened.

torch.fx prints such a device as `device(type='sim', index=0)` under the line `from torch import device`. A process that
has not opened the platform cannot run that: unpickling a GraphModule there, or importing one that `to_folder` wrote,
fails. The remedy is another line above the same call, through the table of names that torch.fx keeps for printing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockstep.platforms.registry import platform_of_device_type

if TYPE_CHECKING:
    import torch

TORCHS_LINE = "from torch import device"
OUR_LINE = f"from {__name__} import device"


def device(type: str, index: int | None = None) -> torch.device:
    """torch.device, after opening the platform whose devices have this type.

    Raises ConfigError when there is none, PlatformError when it cannot be used here.
    """
    import torch

    if not _known_to_torch(type):
        platform_of_device_type(type).device(index or 0)
    return torch.device(type) if index is None else torch.device(type, index)


def make_printed_devices_importable() -> None:
    """Makes graphs printed from now on open the platform of the devices they name. May be called again.

    Does nothing where torch prints anything but its own plain import above a device: then it has found its own way.
    """
    import torch

    if printed_imports().count(TORCHS_LINE) == 1:
        torch.fx.graph._register_custom_builtin("device", OUR_LINE, torch.device)


def printed_imports() -> list[str]:
    """The import lines that torch prints above a graph which names a device."""
    import torch
    from torch.fx.graph_module import _format_import_block
    from torch.package import sys_importer

    graph = torch.fx.Graph()
    graph.output(graph.call_function(torch.empty, (0,), {"device": torch.device("cpu", 0)}))
    code = graph.python_code("self")
    return _format_import_block(code.globals, sys_importer).splitlines() if "device(" in code.src else []


def _known_to_torch(type: str) -> bool:
    import torch

    try:
        torch.device(type)
    except RuntimeError:
        return False
    return True
