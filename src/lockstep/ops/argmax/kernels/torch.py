"""torch's own search."""

from __future__ import annotations

from lockstep.ops.argmax.reference import argmax
from lockstep.ops.contract import Kernel

KERNELS = (Kernel(op="argmax", provider="torch", function=argmax, verified_on=("cpu",)),)
