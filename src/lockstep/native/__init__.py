"""The compiled kernels of processors: whether they are there, and what this processor can run of them.

Owns: loading the extension `_native`, the processor's features, the instruction sets to choose from.
Must not know: operators, torch, the environment. Read first: `loader.py`, then `processor.py`.
"""

from lockstep.native.loader import extension, why_not
from lockstep.native.processor import FEATURES, features, summary, usable_instruction_sets
from lockstep.native.threads import thread_pool

__all__ = ["FEATURES", "extension", "features", "summary", "thread_pool", "usable_instruction_sets", "why_not"]
