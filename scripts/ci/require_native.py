"""Exits 1, with the reason, when the installed package has no native kernels."""

from __future__ import annotations

import sys

from lockstep.native.loader import extension, why_not

if __name__ == "__main__":
    sys.exit(0 if extension() is not None else f"no native kernels: {why_not()}")
