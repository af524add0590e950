"""Torch's linear, which calls the platform's own library."""

from __future__ import annotations

from lockstep.ops.contract import Kernel
from lockstep.ops.linear.reference import linear

KERNELS = (Kernel(op="linear", provider="torch", function=linear, verified_on=("cpu",)),)
