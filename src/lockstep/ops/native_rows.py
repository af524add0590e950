"""Calls of the native extension's row kernels, and what they take."""

from __future__ import annotations

from typing import Any

import torch

from lockstep.native import extension, thread_pool
from lockstep.ops.contract import Signature

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(name: str, instruction_set: str, *arguments: Any) -> None:
    """Calls the extension's function of this name on as many threads as torch may use.

    Tensors may have any strides; the call is over when it returns.
    """
    native = extension()
    assert native is not None
    getattr(native, name)(thread_pool(), torch.get_num_threads(), instruction_set, *arguments)


def refuses_dtypes(signature: Signature) -> str | None:
    """The predicate of kernels that read and write any of DTYPES."""
    for key, value in signature.items():
        if isinstance(value, torch.dtype) and value not in DTYPES:
            return f"reads and writes {', '.join(map(str, DTYPES))}; {key} is {value}"
    return None


def refuses_attention(signature: Signature) -> str | None:
    """The predicate of attention over pages."""
    if signature["head_dim"] % 16:
        return f"needs a head dim that is a multiple of 16, not {signature['head_dim']}"
    return refuses_dtypes(signature)
