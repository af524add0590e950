"""Which attention backend serves a model: decided like every kernel, for each of its two operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from lockstep.attention.backend import AttentionBackend
from lockstep.attention.cudnn_part import CudnnDecode
from lockstep.attention.flashinfer_parts import FlashInferDecode, FlashInferExtend
from lockstep.attention.paged_backend import PagedBackend
from lockstep.attention.part import AttentionPart
from lockstep.attention.table_parts import DecodeTables, ExtendTables
from lockstep.attention.torch_backend import TorchBackend
from lockstep.core.errors import ConfigError, nearest
from lockstep.ops.contract import Kernel, Signature
from lockstep.ops.registry import kernels
from lockstep.ops.selection import Binding, KernelSelector

OPERATORS = ("attention_decode", "attention_extend")
_SHARED = "attention_decode_shared"
_FRESH = "norm_rope_attention_decode"

# Providers whose kernels share more of a step than page tables: both operators together, or each on its own.
_PLANNED: Mapping[str, type[AttentionBackend]] = {"torch": TorchBackend}
_PARTS: Mapping[tuple[str, str], Callable[[Kernel], AttentionPart]] = {
    ("attention_decode", "flashinfer"): FlashInferDecode,
    ("attention_extend", "flashinfer"): FlashInferExtend,
    ("attention_decode", "cudnn"): CudnnDecode,
}


def choose_backend(
    name: str,
    selector: KernelSelector,
    preference: Sequence[str],
    signature: Signature,
    *,
    extend_preference: Sequence[str] = (),
    compile_ahead: bool = False,
    fresh_signature: Signature | None = None,
) -> tuple[AttentionBackend, tuple[Binding, ...]]:
    """The backend of the named provider, or with "auto" of the best ones; and what was bound, why. Where decoding
    follows page tables, a kernel of attention_decode_shared is bound beside it, if there is one for this platform, and
    one of norm_rope_attention_decode of `fresh_signature`, which is None where no kernel could serve every layer.

    `selector` binds the other operators, too; here `preference` orders the providers, `extend_preference` those of
    attention_extend where its best are others. A named provider that has one operator leaves the other to them. With
    `compile_ahead`, a kernel that would serve if it were compiled is compiled first, for minutes, once for a machine;
    where it cannot be, it says so. Raises ConfigError for an unknown name or when the named provider refuses,
    KernelError as KernelSelector does.
    """
    if name != "auto":
        check_backend(name)
    orders = (tuple(preference), tuple(extend_preference) or tuple(preference))
    decoding, extending = (
        _selector_of(op, name, order, selector) for op, order in zip(OPERATORS, orders, strict=True)
    )
    bindings = []
    for op, chosen in zip(OPERATORS, (decoding, extending), strict=True):
        if compile_ahead:
            chosen.compile_first(op, signature)
        binding = chosen.bind(op, "every layer", signature)
        bindings.append(_as_asked(name, binding) if chosen.only else binding)
    decode, extend = (binding.kernel for binding in bindings)
    planned = _PLANNED.get(decode.provider) if decode.provider == extend.provider else None
    if planned is not None:
        return planned(), tuple(bindings)
    own_part = _PARTS.get((decode.op, decode.provider))
    if own_part is None:
        shared = decoding.bind_fused(_SHARED, "every layer", signature)
        fresh = decoding.bind_fused(_FRESH, "every layer", fresh_signature) if fresh_signature else None
        bindings += decoding.bindings[1:]
        beside = (None if binding is None else binding.kernel for binding in (shared, fresh))
        decode_part: AttentionPart = DecodeTables(decode, *beside)
    else:
        decode_part = own_part(decode)
    extend_part = _PARTS.get((extend.op, extend.provider), ExtendTables)(extend)
    return PagedBackend(decode_part, extend_part), tuple(bindings)


def attention_inside(whole: Binding) -> tuple[Binding, ...]:
    """The bindings of a model whose attention a kernel of the whole decoder computes."""
    return tuple(replace(whole, op=op, where="every layer").inside(whole) for op in OPERATORS)


def _selector_of(op: str, name: str, order: tuple[str, ...], selector: KernelSelector) -> KernelSelector:
    """Binds one operator: the named provider's kernel and no other, or where it has none, the best."""
    only = name in _providers(op)
    return selector.ordered((name,) if only else order, only=only)


def check_backend(name: str) -> None:
    """Raises ConfigError naming the nearest backend when `name` is none."""
    known = list(dict.fromkeys(provider for op in OPERATORS for provider in _providers(op)))
    if name not in known:
        raise ConfigError(
            f"unknown attention backend {name!r}{nearest(name, known)} (known: {', '.join(known)})"
        )


def _providers(op: str) -> list[str]:
    return [kernel.provider for kernel in kernels(op)]


def _as_asked(name: str, binding: Binding) -> Binding:
    if binding.refused:
        raise ConfigError(f"--attention-backend {name} cannot be used: {binding.refused[0][1]}")
    asked = binding.kernel.provider == name
    return replace(binding, why=f"asked for by --attention-backend {name}") if asked else binding
