"""FlashInfer's attention of single tokens over pages; see `attention_extend` for how the package is used.

Shapes: B sequences, P pages, N query heads, K KV heads, S page size, H head dim.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from lockstep.core.errors import KernelError
from lockstep.ops.attention_extend.kernels.flashinfer import (
    LAYOUT,
    LayerKind,
    PlannedCall,
    compile_variants,
    library,
    new_workspace,
    refuses_call,
    variants,
    why_not_compiled,
)
from lockstep.ops.attention_extend.page_lists import OwnedPages, PageLists, Stage
from lockstep.ops.contract import Kernel, Signature

GROUPS_WITHOUT_TILES = (1, 2, 3, 4, 8)
"""Query heads of a KV head that the library's program for single rows is generated for; tiles of rows serve others."""
FIXED_PLAN_BYTES = 2**20
"""Room for the plan of a graph: some thousand parts of keys with a few numbers each."""


def program(group: int) -> Literal["decode", "fa2"]:
    """Which of the library's programs decodes for this many query heads of a KV head."""
    return "decode" if group in GROUPS_WITHOUT_TILES else "fa2"


class FixedBatch:
    """Memory that a graph reads: the lists of `num_sequences` sequences with up to `num_pages` pages each."""

    def __init__(self, num_sequences: int, num_pages: int, page_size: int, device: torch.device) -> None:
        self.num_sequences = num_sequences
        self.num_pages = num_pages
        self.page_size = page_size
        sizes = (num_sequences + 1, num_sequences, num_sequences * num_pages)
        self._memory = [torch.zeros(size, dtype=torch.int32, device=device) for size in sizes]

    def lists(self, owned: OwnedPages, stage: Stage = torch.from_numpy) -> PageLists:
        """Lists of single tokens that fit this memory, padded. Raises KernelError when they do not."""
        if len(owned) > self.num_sequences:
            raise KernelError(f"{len(owned)} sequences do not fit a plan for {self.num_sequences}")
        most = -(-int(owned.num_keys_B.max(initial=0)) // self.page_size)
        if most > self.num_pages:
            raise KernelError(f"a sequence of {most} pages does not fit a plan for {self.num_pages}")
        return PageLists.of(owned, self.page_size, stage, num_sequences=self.num_sequences)

    def options(self) -> dict[str, Any]:
        """What the library's wrapper takes to stay inside of this memory."""
        starts, last, pages = self._memory
        return {
            "use_cuda_graph": True,
            "paged_kv_indptr_buffer": starts,
            "paged_kv_indices_buffer": pages,
            "paged_kv_last_page_len_buffer": last,
        }


class DecodeCalls:
    """attention_decode for every kind of layer: planned when a step's first layer of the kind asks.

    With `fixed`, all plans lie in its memory: what a graph recorded of a call follows the kind's last plan.
    """

    def __init__(self, workspace: torch.Tensor, fixed: FixedBatch | None = None) -> None:
        self._workspace = workspace
        self._fixed = fixed
        self._calls: dict[LayerKind, PlannedCall] = {}

    def planned(self, kind: LayerKind, lists: PageLists) -> PlannedCall:
        """The call of this kind for these sequences; it stands until the next plan of the kind."""
        if kind not in self._calls:
            self._calls[kind] = PlannedCall(self._new_wrapper(kind))
        call = self._calls[kind]
        pages = lists.pages_P
        if self._fixed is not None:
            # From the host, the library would wait for the device to copy them.
            pages = pages.to(self._workspace.device, non_blocking=True)
        where = (lists.page_starts_B1, pages, lists.last_page_tokens_B)
        call.plan(*where, *kind.sizes(), **kind.options())
        return call

    def _new_wrapper(self, kind: LayerKind) -> Any:
        with_tiles = program(kind.group) == "fa2"
        options = self._fixed.options() if self._fixed is not None else {}
        wrapper = library().BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, LAYOUT, use_tensor_cores=with_tiles, **options
        )
        if self._fixed is not None:
            # There is one for each size of graph: the library's own 8 MiB would add up.
            room = torch.empty(FIXED_PLAN_BYTES, dtype=torch.uint8, device=self._workspace.device)
            wrapper.reset_workspace_buffer(self._workspace, room)
        return wrapper


def refuses(signature: Signature) -> str | None:
    """What attention_decode by FlashInfer cannot serve, or cannot yet."""
    return refuses_call(signature) or why_not_compiled(variants(_program_of(signature), signature))


def compile_ahead(signature: Signature) -> None:
    """Compiles what calls of this signature lack, where it can."""
    if refuses_call(signature) is None:
        compile_variants(variants(_program_of(signature), signature))


def _program_of(signature: Signature) -> Literal["decode", "fa2"]:
    return program(signature["heads"] // signature["kv_heads"])


def attention_decode(
    q_BNH: torch.Tensor,
    k_KPSH: torch.Tensor,
    v_KPSH: torch.Tensor,
    page_table_BP: torch.Tensor,
    num_keys_B: torch.Tensor,
    sinks_N: torch.Tensor | None,
    out_BNH: torch.Tensor,
    scale: float,
    window: int,
    soft_cap: float,
) -> None:
    """See the contract. Lengths are read on the host; a backend plans once for all layers instead."""
    if q_BNH.shape[0] == 0:
        return
    lists = PageLists.of(OwnedPages.read(page_table_BP, None, num_keys_B), k_KPSH.shape[2])
    calls = DecodeCalls(new_workspace(q_BNH.device))
    calls.planned(LayerKind.of(q_BNH, k_KPSH, window), lists).run(q_BNH, k_KPSH, v_KPSH, out_BNH, scale)


KERNELS = (
    Kernel(
        op="attention_decode",
        provider="flashinfer",
        verified_on=("NVIDIA H100",),
        function=attention_decode,
        platforms=frozenset({"cuda"}),
        features=frozenset({"sm_90"}),
        refuses=refuses,
        asks_host=True,
        compile_ahead=compile_ahead,
    ),
)
