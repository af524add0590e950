"""Which attention backend serves a model: decided like every kernel, for both of its operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lockstep.attention.backend import AttentionBackend
from lockstep.attention.paged_backend import PagedBackend
from lockstep.attention.torch_backend import TorchBackend
from lockstep.core.capabilities import Capabilities
from lockstep.core.errors import ConfigError, nearest
from lockstep.ops.contract import Signature
from lockstep.ops.registry import kernels
from lockstep.ops.selection import Binding, KernelSelector

OPERATORS = ("attention_decode", "attention_extend")

# Providers whose kernels share more of a step than page tables, and the backend that plans it for them.
_PLANNED: Mapping[str, type[AttentionBackend]] = {"torch": TorchBackend}


def choose_backend(
    name: str,
    capabilities: Capabilities,
    preference: Sequence[str],
    signature: Signature,
    *,
    forced: Mapping[str, str] | None = None,
    strict: bool = False,
) -> tuple[AttentionBackend, tuple[Binding, ...]]:
    """The backend of the named provider, or with "auto" of the best ones; and what was bound, why.

    `preference`, `forced` and `strict` are KernelSelector's. Raises ConfigError for an unknown name or when the named
    provider refuses, KernelError as KernelSelector does.
    """
    named = name != "auto"
    if named:
        _check_known(name)
    selector = KernelSelector(
        capabilities, (name,) if named else tuple(preference), forced=forced, strict=strict and not named
    )
    bindings = [selector.bind(op, "every layer", signature) for op in OPERATORS]
    if named:
        bindings = [_as_asked(name, binding) for binding in bindings]
    decode, extend = (binding.kernel for binding in bindings)
    planned = _PLANNED.get(decode.provider) if decode.provider == extend.provider else None
    return planned() if planned else PagedBackend(decode, extend), tuple(bindings)


def _check_known(name: str) -> None:
    of_decode, of_extend = ([kernel.provider for kernel in kernels(op)] for op in OPERATORS)
    known = [provider for provider in of_decode if provider in of_extend]
    if name not in known:
        raise ConfigError(
            f"unknown attention backend {name!r}{nearest(name, known)} (known: {', '.join(known)})"
        )


def _as_asked(name: str, binding: Binding) -> Binding:
    if binding.refused:
        raise ConfigError(f"--attention-backend {name} cannot be used: {binding.refused[0][1]}")
    asked = binding.kernel.provider == name
    return replace(binding, why=f"asked for by --attention-backend {name}") if asked else binding
