"""Finds the model class of an architecture. A new file in `llm/` is enough to add one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import lockstep.models.llm
from lockstep.core.errors import ModelFileError, nearest

if TYPE_CHECKING:
    from lockstep.models.llm.decoder import DecoderModel


@cache
def model_classes() -> dict[str, type[DecoderModel]]:
    """Architecture name, as config.json spells it, to class."""
    from lockstep.models.llm.decoder import DecoderModel

    found: dict[str, type[DecoderModel]] = {}
    for module in pkgutil.iter_modules(lockstep.models.llm.__path__):
        members = vars(importlib.import_module(f"lockstep.models.llm.{module.name}")).values()
        for member in members:
            # Not isinstance(member, type): Python 3.10 says yes of an alias such as list[int], which is no class.
            if DecoderModel in getattr(member, "__mro__", ()) and "architectures" in vars(member):
                found.update(dict.fromkeys(member.architectures, member))
    return found


def model_class(config: Mapping[str, Any]) -> type[DecoderModel]:
    """The class for a config.json. Raises ModelFileError naming the nearest known architecture."""
    known = model_classes()
    for name in config.get("architectures") or ():
        if name in known:
            return known[name]
    names = ", ".join(config.get("architectures") or ()) or "none"
    raise ModelFileError(
        f"architecture {names} is not supported{nearest(names, known)} (supported: {', '.join(sorted(known))})"
    )
