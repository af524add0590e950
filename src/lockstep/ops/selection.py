"""Which kernel a call site gets: decided once, when a model is built, and written down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.core.capabilities import Capabilities
from lockstep.core.errors import KernelError, nearest
from lockstep.ops.contract import Contract, Kernel, Signature
from lockstep.ops.registry import contracts, kernels


@dataclass(frozen=True, slots=True)
class Binding:
    """A kernel bound to a call site, why it was, and why each better-placed one was refused."""

    op: str
    where: str
    kernel: Kernel
    why: str
    refused: tuple[tuple[str, str], ...] = ()

    @property
    def function(self) -> Callable[..., Any]:
        """What the call site calls."""
        return self.kernel.function


class KernelSelector:
    """Binds operators to kernels for one device and remembers every decision.

    `preference` orders providers, best first. `forced` maps an operator to a provider; "*" stands for every operator
    that has a kernel of that provider. `strict` makes a fallback (a preferred kernel that exists for this platform
    but refuses) an error. Raises KernelError when `forced` names an operator or a provider that is not known.
    """

    def __init__(
        self,
        capabilities: Capabilities,
        preference: tuple[str, ...],
        *,
        forced: Mapping[str, str] | None = None,
        strict: bool = False,
    ) -> None:
        self._capabilities = capabilities
        self._preference = preference if "reference" in preference else (*preference, "reference")
        self._forced = dict(forced or {})
        self._strict = strict
        self.bindings: list[Binding] = []
        self._check_forced()

    def bind(self, op: str, where: str, signature: Signature, *, strict: bool = True) -> Binding:
        """The kernel for this call site. Raises KernelError when none accepts, or a forced one refuses.

        `strict=False`: the reference is as good, because its parts are bound one by one.
        """
        contract = contracts().get(op)
        if contract is None:
            raise KernelError(f"unknown operator {op!r}{nearest(op, contracts())}")
        _check_signature(contract, signature)
        provider = self._forced.get(op) or self._forced.get("*")
        forced = next((kernel for kernel in kernels(op) if kernel.provider == provider), None)
        if forced is not None:
            binding = self._bind_forced(where, signature, forced)
        else:
            binding = self._bind_preferred(op, where, signature, self._strict and strict)
        self.bindings.append(binding)
        return binding

    def _bind_forced(self, where: str, signature: Signature, kernel: Kernel) -> Binding:
        option = f"--force-kernel {kernel.op}={kernel.provider}"
        reason = self._refusal(kernel, signature)
        if reason is not None:
            raise KernelError(f"{option} cannot serve {where}: {reason}")
        return Binding(kernel.op, where, kernel, f"forced by {option}")

    def _bind_preferred(self, op: str, where: str, signature: Signature, strict: bool) -> Binding:
        by_provider = {kernel.provider: kernel for kernel in kernels(op)}
        refused: list[tuple[str, str]] = []
        for provider in self._preference:
            kernel = by_provider.get(provider)
            if kernel is None:
                continue
            reason = self._refusal(kernel, signature)
            if reason is None:
                why = "first in this platform's preference" if not refused else "first that accepts"
                return Binding(op, where, kernel, why, tuple(refused))
            if strict and _made_for(kernel, self._capabilities):
                raise KernelError(f"--strict-kernels: {op}.{provider} refuses {where}: {reason}")
            refused.append((provider, reason))
        reasons = "; ".join(f"{provider}: {reason}" for provider, reason in refused)
        raise KernelError(f"no kernel of {op!r} can serve {where} ({reasons})")

    def _refusal(self, kernel: Kernel, signature: Signature) -> str | None:
        return unmet_need(kernel, self._capabilities) or kernel.refuses(signature)

    def _check_forced(self) -> None:
        for op, provider in self._forced.items():
            if op != "*" and op not in contracts():
                raise KernelError(f"--force-kernel names unknown operator {op!r}{nearest(op, contracts())}")
            ops = contracts() if op == "*" else (op,)
            known = list(dict.fromkeys(kernel.provider for name in ops for kernel in kernels(name)))
            if provider not in known:
                raise KernelError(
                    f"--force-kernel {op}={provider} names no kernel{nearest(provider, known)} "
                    f"(known: {', '.join(known)})"
                )


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
