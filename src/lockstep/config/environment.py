"""The only file that reads the environment. Nothing writes it.

Options name their variable where they are declared (`env=` in `components.py`); `SWITCHES` are the others.
A variable that is set but empty counts as not set.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lockstep.config.components import OPTIONS

DEBUG = "LOCKSTEP_DEBUG"
DISABLE_FEATURES = "LOCKSTEP_DISABLE_FEATURES"

SWITCHES: dict[str, str] = {
    DEBUG: "1: the command line shows the traceback of an error instead of one line.",
    DISABLE_FEATURES: "Processor features that native kernels must do without, e.g. `avx512_bf16,avx2`.",
}


def variables() -> dict[str, str]:
    """Every variable that Lockstep reads, with what it does."""
    options = {found.env: f"Default of `{found.flag}`." for found in OPTIONS.values() if found.env}
    options["LOCKSTEP_MODEL"] = "Default of `MODEL`."
    return {**options, **SWITCHES}


def from_environment(environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Values that variables give, by option name, checked. Raises ConfigError naming the variable."""
    environ = os.environ if environ is None else environ
    return {
        found.name: found.parse(environ[found.env], found.env)
        for found in OPTIONS.values()
        if found.env and environ.get(found.env)
    }


def debugging(environ: Mapping[str, str] | None = None) -> bool:
    """True when the user asked for tracebacks."""
    environ = os.environ if environ is None else environ
    return environ.get(DEBUG, "") not in ("", "0")


def disabled_features(environ: Mapping[str, str] | None = None) -> frozenset[str]:
    """Processor features that the user forbids: names between commas, as written; `lockstep.native` knows them."""
    environ = os.environ if environ is None else environ
    names = environ.get(DISABLE_FEATURES, "").split(",")
    return frozenset(name.strip() for name in names) - {""}
