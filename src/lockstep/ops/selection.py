"""Which kernel a call site gets: decided once, when a model is built, and written down."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lockstep.core.capabilities import Capabilities
from lockstep.core.errors import KernelError, nearest
from lockstep.ops.background import BackgroundCompiler
from lockstep.ops.contract import Contract, Kernel, Signature
from lockstep.ops.registry import contracts, kernels

PORTABLE = ("torch", "reference")
"""Providers that serve any device. A provider that a preference does not name stands before them."""


@dataclass(frozen=True, slots=True)
class Binding:
    """A kernel bound to a call site, why it was, and why each better-placed one was refused."""

    op: str
    where: str
    kernel: Kernel
    why: str
    refused: tuple[tuple[str, str], ...] = ()
    signature: Signature = field(default_factory=dict, repr=False, compare=False)

    @property
    def function(self) -> Callable[..., Any]:
        """What the call site calls."""
        return self.kernel.function

    def inside(self, whole: Binding) -> Binding:
        """The same call site where the kernel of a larger operator computes it."""
        name = f"{whole.op}.{whole.kernel.provider}"
        stands_for = Kernel(self.op, name, whole.kernel.function, asks_host=whole.kernel.asks_host)
        return replace(self, kernel=stands_for, why=f"inside {name}", refused=(), signature={})


class KernelSelector:
    """Binds operators to kernels for one device and remembers every decision.

    `preference` orders providers, best first; one that it does not name comes before torch and the reference, or with
    `only` nowhere. `forced` maps an operator to a provider; "*" stands for every operator that has a kernel of that
    provider. `strict` makes a fallback (a preferred kernel that exists for this platform but refuses) an error.
    `measured_in` is the folder of what was measured and compiled on this machine, which `background` fills with what
    bound kernels will call. Raises KernelError when `forced`
    names an operator or a provider that is not known.
    """

    def __init__(
        self,
        capabilities: Capabilities,
        preference: tuple[str, ...],
        *,
        only: bool = False,
        forced: Mapping[str, str] | None = None,
        strict: bool = False,
        measured_in: Path | None = None,
        background: BackgroundCompiler | None = None,
    ) -> None:
        self._capabilities = capabilities
        self._background = background
        self._measured_in = measured_in
        self._preference = _with_reference(preference)
        self.only = only
        self._forced = dict(forced or {})
        self._strict = strict
        self.bindings: list[Binding] = []
        check_forced(self._forced)

    def ordered(self, preference: tuple[str, ...], *, only: bool = False) -> KernelSelector:
        """A selector that prefers other providers and has no bindings yet; all else is as here. With `only`, where
        its caller is to refuse a fallback, none is an error."""
        other = copy.copy(self)
        other._preference, other.only = _with_reference(preference), only
        other._strict = self._strict and not only
        other.bindings = []
        return other

    def compile_first(self, op: str, signature: Signature) -> None:
        """Compiles what kernels lack until one accepts: that one, or a forced one, will be bound."""
        provider = self._forced.get(op) or self._forced.get("*")
        forced = [kernel for kernel in kernels(op) if kernel.provider == provider]
        for kernel in forced or self._in_order(op):
            if unmet_need(kernel, self._capabilities) is not None:
                continue
            if kernel.compile_ahead is not None:
                kernel.compile_ahead(signature)
            if kernel.refuses(signature) is None:
                return

    def bind(self, op: str, where: str, signature: Signature) -> Binding:
        """The kernel for this call site. Raises KernelError when none accepts, or a forced one refuses."""
        _check_signature(_contract(op), signature)
        provider = self._forced.get(op) or self._forced.get("*")
        forced = next((kernel for kernel in kernels(op) if kernel.provider == provider), None)
        if forced is not None:
            binding = self._bind_forced(where, signature, forced)
        else:
            binding = self._bind_preferred(op, where, signature)
        return self._written_down(binding)

    def bind_fused(
        self, op: str, where: str, signature: Signature, *, apart: str | None = None
    ) -> Binding | None:
        """One kernel for what the operator's parts compute; None where the caller is to bind them one by one.

        Whoever forces a kernel of a part gets the parts; so does whoever has another reason, `apart`. The second
        outcome is written down as a kernel "parts", where the platform has a kernel that could have served. Raises
        KernelError when a kernel forced for `op` refuses, or when the parts were asked for as well.
        """
        contract = _contract(op)
        _check_signature(contract, signature)
        apart = apart or self._asks_for_parts(contract)
        asked = self._forced.get(op, "reference")
        if asked != "reference":
            if apart is not None:
                raise KernelError(f"--force-kernel {op}={asked} cannot serve {where}: {apart}")
            return self.bind(op, where, signature)
        made = [kernel for kernel in self._together(op) if _made_for(kernel, self._capabilities)]
        if not made:
            return None
        refused: list[tuple[str, str]] = []
        for kernel in made:
            reason = apart or self._refusal(kernel, signature)
            if reason is None:
                why = "computes its parts together"
                return self._written_down(Binding(op, where, kernel, why, tuple(refused), signature))
            refused.append((kernel.provider, reason))
        parts = Kernel(op, "parts", contract.reference)
        why = "each part has its own kernel"
        self.bindings.append(Binding(op, where, parts, why, tuple(refused), signature))
        return None

    def _written_down(self, binding: Binding) -> Binding:
        """The binding, with what this machine has for its kernel."""
        if self._measured_in is not None and binding.kernel.with_measured is not None:
            function = binding.kernel.with_measured(self._measured_in)
            binding = replace(binding, kernel=replace(binding.kernel, function=function))
        if self._background is not None:
            self._background.add(binding.kernel, binding.signature)
        self.bindings.append(binding)
        return binding

    def _together(self, op: str) -> list[Kernel]:
        """Kernels that compute a fused operator as one, in the order that they are asked in."""
        together = [kernel for kernel in kernels(op) if kernel.provider != "reference"]
        starred = [kernel for kernel in together if kernel.provider == self._forced.get("*")]
        return starred or [kernel for kernel in self._in_order(op) if kernel in together]

    def _in_order(self, op: str) -> list[Kernel]:
        """Kernels of the preference, best first."""
        by_provider = {kernel.provider: kernel for kernel in kernels(op)}
        order = list(self._preference)
        if not self.only:
            first_portable = next(at for at, provider in enumerate(order) if provider in PORTABLE)
            order[first_portable:first_portable] = [
                provider
                for provider, kernel in by_provider.items()
                if provider not in (*order, *PORTABLE)
                and not kernel.by_name
                and _made_for(kernel, self._capabilities)
            ]
        return [by_provider[provider] for provider in order if provider in by_provider]

    def _asks_for_parts(self, contract: Contract) -> str | None:
        for name in contract.parts:
            if name in self._forced:
                return f"--force-kernel {name}={self._forced[name]} asks for the parts"
        option = contract.name if contract.name in self._forced else "*"
        asked = self._forced.get(option)
        if asked is None or (asked != "reference" and asked in map(_provider, kernels(contract.name))):
            return None
        return f"--force-kernel {option}={asked} asks for the parts"

    def _bind_forced(self, where: str, signature: Signature, kernel: Kernel) -> Binding:
        option = f"--force-kernel {kernel.op}={kernel.provider}"
        reason = self._refusal(kernel, signature)
        if reason is not None:
            raise KernelError(f"{option} cannot serve {where}: {reason}")
        return Binding(kernel.op, where, kernel, f"forced by {option}", signature=signature)

    def _bind_preferred(self, op: str, where: str, signature: Signature) -> Binding:
        refused: list[tuple[str, str]] = []
        for kernel in self._in_order(op):
            reason = self._refusal(kernel, signature)
            if reason is None:
                return Binding(op, where, kernel, self._why(kernel, bool(refused)), tuple(refused), signature)
            is_preferred = kernel.provider in self._preference and _made_for(kernel, self._capabilities)
            if self._strict and is_preferred:
                raise KernelError(f"--strict-kernels: {op}.{kernel.provider} refuses {where}: {reason}")
            refused.append((kernel.provider, reason))
        reasons = "; ".join(f"{provider}: {reason}" for provider, reason in refused)
        raise KernelError(f"no kernel of {op!r} can serve {where} ({reasons})")

    def _why(self, kernel: Kernel, others_refused: bool) -> str:
        if others_refused:
            return "first that accepts"
        if kernel.provider not in self._preference:
            return "named by no preference of this platform, so before torch and the reference"
        if kernel.provider == self._preference[0]:
            return "first in this platform's preference"
        return "first that this operator has of this platform's preference"

    def _refusal(self, kernel: Kernel, signature: Signature) -> str | None:
        return unmet_need(kernel, self._capabilities) or kernel.refuses(signature)


def check_forced(forced: Mapping[str, str]) -> None:
    """Raises KernelError for an operator that does not exist, or a kernel that it does not have."""
    for op, provider in forced.items():
        if op != "*" and op not in contracts():
            raise KernelError(f"--force-kernel names unknown operator {op!r}{nearest(op, contracts())}")
        ops = contracts() if op == "*" else (op,)
        known = list(dict.fromkeys(kernel.provider for name in ops for kernel in kernels(name)))
        if provider not in known:
            raise KernelError(
                f"--force-kernel {op}={provider} names no kernel{nearest(provider, known)} "
                f"(known: {', '.join(known)})"
            )


def passed_over(binding: Binding, capabilities: Capabilities) -> tuple[tuple[str, str], ...]:
    """(provider, reason) of every other kernel of the operator, those first that stood before the bound one."""
    known = dict(binding.refused)
    for kernel in kernels(binding.op):
        is_bound = binding.kernel.provider in (kernel.provider, _instead_of(kernel.provider))
        if is_bound or kernel.provider in known:
            continue
        reason = unmet_need(kernel, capabilities) or kernel.refuses(binding.signature)
        by_name = "bound only by name" if kernel.by_name else None
        known[kernel.provider] = reason or by_name or f"{binding.kernel.provider} is bound"
    return tuple(known.items())


def require_served(forced: Mapping[str, str], bindings: Iterable[Binding]) -> None:
    """Raises KernelError for a forced kernel that no call site of a built model got: it would change nothing."""
    sites = list(bindings)
    for op, provider in forced.items():
        served = {each.op for each in sites if each.kernel.provider in (provider, _instead_of(provider))}
        if op in served or (op == "*" and served):
            continue
        present = ", ".join(sorted({each.op for each in sites}))
        what = f"no call of {op}" if op != "*" else f"no operator with a kernel {provider}"
        raise KernelError(
            f"--force-kernel {op}={provider} would change nothing: this model has {what} of its own "
            f"(it has {present})"
        )


def _with_reference(preference: tuple[str, ...]) -> tuple[str, ...]:
    return preference if "reference" in preference else (*preference, "reference")


def _provider(kernel: Kernel) -> str:
    return kernel.provider


def _instead_of(provider: str) -> str:
    """What stands in a binding for the reference of a fused operator."""
    return "parts" if provider == "reference" else provider


def _contract(op: str) -> Contract:
    contract = contracts().get(op)
    if contract is None:
        raise KernelError(f"unknown operator {op!r}{nearest(op, contracts())}")
    return contract


def unmet_need(kernel: Kernel, capabilities: Capabilities) -> str | None:
    """Why a kernel can run no call at all on a device of these capabilities; None when the call decides."""
    if not _made_for(kernel, capabilities):
        return f"made for {', '.join(sorted(kernel.platforms))}, not {capabilities.platform}"
    missing = [feature for feature in sorted(kernel.features) if not capabilities.has(feature)]
    return f"the device lacks {', '.join(missing)}" if missing else None


def _made_for(kernel: Kernel, capabilities: Capabilities) -> bool:
    return not kernel.platforms or capabilities.platform in kernel.platforms


def _check_signature(contract: Contract, signature: Signature) -> None:
    for key in signature:
        if key not in contract.signature:
            raise KernelError(
                f"operator {contract.name!r} has no signature entry {key!r}{nearest(key, contract.signature)}"
            )
    missing = [key for key in contract.signature if key not in signature]
    if missing:
        raise KernelError(f"operator {contract.name!r} was bound without {', '.join(missing)}")
