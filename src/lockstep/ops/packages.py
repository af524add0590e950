"""What kernels of other people's packages have in common."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection

import torch

from lockstep.ops.contract import Signature


def required(name: str, dtypes: Collection[torch.dtype]) -> Callable[[Signature], str | None]:
    """A predicate that refuses where the package is not installed, or where a tensor has another dtype than these.

    A weight that is kept in another dtype than the values is refused too.
    """

    def refuses(signature: Signature) -> str | None:
        dtype = signature["dtype"]
        if dtype not in dtypes or signature.get("weight_dtype", dtype) != dtype:
            return f"{name} serves {' or '.join(map(str, dtypes))} throughout"
        return None if importlib.util.find_spec(name) else f"the package {name} is not installed"

    return refuses
