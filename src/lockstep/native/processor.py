"""What the processor has, and which of the extension's instruction sets that suffices for."""

from __future__ import annotations

from collections.abc import Iterable

from lockstep.core.errors import ConfigError, nearest
from lockstep.native.loader import extension, why_not

FEATURES = (
    *("avx", "fma", "f16c", "avx2", "avx_vnni"),
    *("avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512vbmi", "avx512_vnni", "avx512_bf16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16"),
)
"""Every feature that the extension can tell, under the names that Linux prints in /proc/cpuinfo."""


def features(disabled: Iterable[str] = ()) -> frozenset[str]:
    """Instruction-set extensions that the processor has and the system lets it use, less the `disabled` ones.

    Empty without the extension. `disabled` may name what the processor lacks, so that one list serves several
    machines. Raises ConfigError for a name that no processor has.
    """
    without = frozenset(disabled)
    for name in sorted(without.difference(FEATURES)):
        raise ConfigError(f"no processor feature is called {name!r}{nearest(name, FEATURES)}")
    native = extension()
    return frozenset(native.processor_features()) - without if native else frozenset()


def usable_instruction_sets(disabled: Iterable[str] = ()) -> tuple[str, ...]:
    """Names of the extension's instruction sets that need none but `features(disabled)`, best first.

    They are "amx", "avx512_bf16", "avx512", "avx_vnni", "avx2", "neon" and, always the last, "scalar". Empty without
    the extension.
    """
    native = extension()
    left = features(disabled)
    return tuple(native.usable_instruction_sets(sorted(left))) if native else ()


def summary(disabled: Iterable[str] = (), chosen: Iterable[str] = ()) -> str:
    """A phrase for people: "native kernels: avx2", or "no native kernels (not built: no C++ compiler)".

    `chosen` names the instruction sets that serve, where they are not the best one alone.
    """
    usable = tuple(chosen) or usable_instruction_sets(disabled)[:1]
    return f"native kernels: {', '.join(usable)}" if usable else f"no native kernels ({why_not()})"
