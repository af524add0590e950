"""Which attention backend serves a model: decided like every kernel, for each of its two operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lockstep.attention.backend import AttentionBackend
from lockstep.attention.cudnn_parts import CudnnPart
from lockstep.attention.flashinfer_parts import FlashInferDecode, FlashInferExtend
from lockstep.attention.paged_backend import PagedBackend
from lockstep.attention.part import AttentionPart
from lockstep.attention.table_parts import DecodeTables, ExtendTables
from lockstep.attention.torch_backend import TorchBackend
from lockstep.core.capabilities import Capabilities
from lockstep.core.errors import ConfigError, nearest
from lockstep.ops.background import BackgroundCompiler
from lockstep.ops.contract import Kernel, Signature
from lockstep.ops.registry import kernels
from lockstep.ops.selection import Binding, KernelSelector, unmet_need

OPERATORS = ("attention_decode", "attention_extend")
_SHARED = "attention_decode_shared"
_FRESH = "norm_rope_attention_decode"

# Providers whose kernels share more of a step than page tables: both operators together, or each on its own.
_PLANNED: Mapping[str, type[AttentionBackend]] = {"torch": TorchBackend}
_PARTS: Mapping[tuple[str, str], Callable[[Kernel], AttentionPart]] = {
    ("attention_decode", "flashinfer"): FlashInferDecode,
    ("attention_extend", "flashinfer"): FlashInferExtend,
    ("attention_decode", "cudnn"): CudnnPart,
    ("attention_extend", "cudnn"): CudnnPart,
}


def choose_backend(
    name: str,
    capabilities: Capabilities,
    preference: Sequence[str],
    signature: Signature,
    *,
    extend_preference: Sequence[str] = (),
    forced: Mapping[str, str] | None = None,
    strict: bool = False,
    compile_ahead: bool = False,
    fresh_signature: Signature | None = None,
    measured_in: Path | None = None,
    background: BackgroundCompiler | None = None,
    selector: type[KernelSelector] = KernelSelector,
) -> tuple[AttentionBackend, tuple[Binding, ...]]:
    """The backend of the named provider, or with "auto" of the best ones; and what was bound, why. Where decoding
    follows page tables, a kernel of attention_decode_shared is bound beside it, if there is one for this platform, and
    one of norm_rope_attention_decode of `fresh_signature`, which is None where no kernel could serve every layer.

    `preference`, `forced` and `strict` are KernelSelector's; `extend_preference` orders the providers of
    attention_extend where its best are others. With `compile_ahead`, a kernel that would serve if it were compiled is
    compiled first, for minutes, once for a machine; where it cannot be, it says so. `measured_in` and `background` are
    KernelSelector's, for what is bound beside decoding. `selector` binds, as it does the other operators. Raises
    ConfigError for an unknown name or when the named provider refuses, KernelError as KernelSelector does.
    """
    named = name != "auto"
    if named:
        check_backend(name)
    bindings = []
    orders = _orders(name, preference, extend_preference)
    for op, order in orders:
        if compile_ahead:
            _compile_first(op, order, capabilities, signature, forced or {})
        strictly = strict and not named
        chosen = selector(capabilities, order, only=named, forced=forced, strict=strictly)
        binding = chosen.bind(op, "every layer", signature)
        bindings.append(_as_asked(name, binding) if named else binding)
    decode, extend = (binding.kernel for binding in bindings)
    planned = _PLANNED.get(decode.provider) if decode.provider == extend.provider else None
    if planned is not None:
        return planned(), tuple(bindings)
    own_part = _PARTS.get((decode.op, decode.provider))
    if own_part is None:
        order = orders[0][1]
        choosing = selector(
            capabilities,
            order,
            only=named,
            forced=forced,
            measured_in=measured_in,
            background=background,
        )
        shared = choosing.bind_fused(_SHARED, "every layer", signature)
        fresh = choosing.bind_fused(_FRESH, "every layer", fresh_signature) if fresh_signature else None
        bindings += choosing.bindings
        beside = (None if binding is None else binding.kernel for binding in (shared, fresh))
        decode_part: AttentionPart = DecodeTables(decode, *beside)
    else:
        decode_part = own_part(decode)
    extend_part = _PARTS.get((extend.op, extend.provider), ExtendTables)(extend)
    return PagedBackend(decode_part, extend_part), tuple(bindings)


def attention_inside(whole: Binding) -> tuple[Binding, ...]:
    """The bindings of a model whose attention a kernel of the whole decoder computes."""
    return tuple(replace(whole, op=op, where="every layer").inside(whole) for op in OPERATORS)


def _orders(
    name: str, preference: Sequence[str], extend_preference: Sequence[str]
) -> list[tuple[str, tuple[str, ...]]]:
    """Each operator with its providers, best first."""
    if name != "auto":
        return [(op, (name,)) for op in OPERATORS]
    orders = (tuple(preference), tuple(extend_preference) or tuple(preference))
    return list(zip(OPERATORS, orders, strict=True))


def _compile_first(
    op: str,
    order: Sequence[str],
    capabilities: Capabilities,
    signature: Signature,
    forced: Mapping[str, str],
) -> None:
    """Compiles what kernels lack until one accepts: that one, or a forced one, will be bound."""
    by_provider = {kernel.provider: kernel for kernel in kernels(op)}
    asked = forced.get(op) or forced.get("*")
    for kernel in map(by_provider.get, (asked,) if asked in by_provider else order):
        if kernel is None or unmet_need(kernel, capabilities) is not None:
            continue
        if kernel.compile_ahead is not None:
            kernel.compile_ahead(signature)
        if kernel.refuses(signature) is None:
            return


def check_backend(name: str) -> None:
    """Raises ConfigError naming the nearest backend when `name` is none."""
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
