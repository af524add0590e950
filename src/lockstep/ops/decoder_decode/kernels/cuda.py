"""Our own kernel for Hopper: thread blocks stay from the first block's norm to the last one.

Shapes: B sequences, D model, R2 half of a head, L blocks, K KV heads, P pages, S page size, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from lockstep.ops.contract import Kernel, Signature
from lockstep.ops.decoder_decode.hopper_shape import DecoderShape, most_rows, why_not
from lockstep.ops.decoder_forward.outline import DecoderOutline


def _refuses(signature: Signature) -> str | None:
    if signature["num_ranks"] != 1:
        return "computes all of a model on one rank"
    if {signature["dtype"], signature["pool_dtype"]} != {torch.bfloat16}:
        return "multiplies bfloat16, and keeps keys and values so"
    if not signature["plain"] or signature["activation"] != "silu":
        return "knows Llama's and Qwen 3's blocks, of plain weights"
    shape = _shape_of(signature)
    reason = why_not(shape)
    if reason is not None:
        return reason
    if most_rows(shape.hidden) == 0:
        return f"is not known to be faster than one kernel after the other with rows of {shape.hidden} numbers"
    from lockstep.ops.cuda_program import missing_compiler

    return missing_compiler()


def _shape_of(signature: Signature) -> DecoderShape:
    group = signature["heads"] // signature["kv_heads"]
    names = ("head_dim", "blocks", "page_size", "head_norms", "qkv_bias")
    sizes = (signature["hidden_size"], signature["inner_size"], signature["kv_heads"], group)
    return DecoderShape(*sizes, *(signature[name] for name in names))


def compile_later(
    signature: Signature, cache_dir: Path, device: torch.device
) -> Iterator[Callable[[], object]]:
    """The kernel of each number of rows that it takes."""
    from lockstep.ops.decoder_decode.hopper import programs

    return programs(_shape_of(signature), device, cache_dir)


def prepare(outline: DecoderOutline) -> Any:
    """What holds the addresses of the decoder's weights, and the memory through which thread blocks talk."""
    from lockstep.ops.decoder_decode.hopper import Program

    return Program(outline)


def decoder_decode(
    embedded_BD: torch.Tensor,
    cos_BR2: torch.Tensor,
    sin_BR2: torch.Tensor,
    page_table_BP: torch.Tensor,
    num_keys_B: torch.Tensor,
    program: Any,
    kv_L2KPSH: torch.Tensor,
    *,
    cache_dir: Path | None = None,
) -> torch.Tensor:
    """See the contract. `program` comes from `prepare`. Compiled kernels are kept in `cache_dir`, if one is given.

    Raises KernelError for more rows than the kernel takes.
    """
    step = (embedded_BD, cos_BR2, sin_BR2, page_table_BP, num_keys_B, kv_L2KPSH)
    hidden_BD: torch.Tensor = program.step(*step, cache_dir)
    return hidden_BD


@cache
def _with_measured(cache_dir: Path) -> Callable[..., Any]:
    return partial(decoder_decode, cache_dir=cache_dir)


KERNELS = (
    Kernel(
        op="decoder_decode",
        provider="cuda",
        verified_on=("NVIDIA H100",),
        function=decoder_decode,
        platforms=frozenset({"cuda"}),
        features=frozenset({"sm_90", "cuda_bindings"}),
        refuses=_refuses,
        prepare=prepare,
        opaque=True,
        with_measured=_with_measured,
        compile_later=compile_later,
    ),
)
