"""Calls that libraries' attention is checked with on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from lockstep.ops.attention_decode.contract import case as decode_case
from lockstep.ops.attention_extend.cases import Layer
from lockstep.ops.attention_extend.contract import case as extend_case
from lockstep.ops.check import check_kernel
from lockstep.ops.contract import Case, Kernel
from lockstep.ops.registry import contracts

# One dtype, head size and kind of mask: what FlashInfer compiles once, in two minutes where that is still to do.
LAYERS = (Layer(32, 8, 128, 16), Layer(16, 8, 128, 16), Layer(32, 4, 128, 64), Layer(4, 4, 128, 16))
DTYPE = torch.bfloat16


def cases(op: str) -> Iterator[Case]:
    """Few calls of every kind that a step has: whole prompts, chunks, single tokens, long contexts, padding."""
    for layer in LAYERS:
        if op == "attention_decode":
            for num_keys in ((37,), (130, 5, 0, 2049), (16, 17, 1) * 20):
                yield decode_case(DTYPE, layer, num_keys)
            yield decode_case(DTYPE, layer, (20, 33), pages_first=True)
        else:
            for batch in (((300, 300),), ((20, 20), (1, 48), (0, 12), (130, 900), (1, 1)), ((3, 4000),)):
                yield extend_case(DTYPE, layer, batch, num_padding_rows=3)
            yield extend_case(DTYPE, layer, ((9, 20), (3, 3)), slice_rows=True)


def compiled(kernel: Kernel) -> Kernel:
    """The kernel, ready for the layers above."""
    for layer in LAYERS:
        if kernel.compile_ahead is not None:
            kernel.compile_ahead(layer.signature(DTYPE))
        assert kernel.refuses(layer.signature(DTYPE)) is None
    return kernel


def assert_right(tested: Kernel, platform: str, seed: int) -> None:
    contract = contracts()[tested.op]
    contract = replace(contract, cases=lambda: cases(tested.op))
    report = check_kernel(contract, tested, seed=seed, device=platform)
    print(f"{tested.provider}: {report.num_cases} cases, worst {report.worst_share:.2f} in {report.worst_case}")
    assert report.passed and not report.refused, report.failures
