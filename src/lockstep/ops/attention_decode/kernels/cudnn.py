"""cuDNN's fused attention over pages, through its graphs, which the library compiles itself.

Lengths and page tables are read on the device, but a graph is made for as many sequences and for the most keys that one
may have. Both are rounded up, so that a few graphs serve every step.
Single rows only: with more of them the library multiplies values behind a sequence's keys, in its last page, by zero,
and a NaN that was left there reaches the result (cuDNN 9 on one NVIDIA H100 80GB), which attention_extend forbids.
Source of the interface: cudnn-frontend 1.18, "Attention": paged attention, ragged layout, bottom-right causal masks.
Shapes: B sequences, each of one row; N query heads, K KV heads, P pages, W pages of the widest table, S page size,
H head dim.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from lockstep.ops.attention_extend.page_lists import OwnedPages, Stage
from lockstep.ops.contract import Kernel, Signature

DTYPES = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF"}
"""The library's names of what it multiplies."""
LEAST_PAGES = 16
"""What the longest sequence is rounded up to at least."""

_Q, _K, _V, _OUT, _NUM_ROWS, _NUM_KEYS, _TABLE_K, _TABLE_V, _ROWS_OF_Q, _ROWS_OF_OUT = range(1, 11)
"""Numbers of the tensors in a graph."""
_ALIGNED = 16
"""Lists begin at multiples of this many entries in the memory that they share."""


@dataclass(frozen=True, slots=True)
class GraphSize:
    """What is rounded up: sequences, and pages of one."""

    batch: int
    pages: int

    @classmethod
    def of(cls, owned: OwnedPages, page_size: int) -> GraphSize:
        """The size that serves these sequences."""
        pages = -(-int(owned.num_keys_B.max()) // page_size)
        return cls(_rounded_up(len(owned), 1), _rounded_up(pages, LEAST_PAGES))


def _rounded_up(size: int, least: int) -> int:
    while least < size:
        least *= 4
    return least


@dataclass(frozen=True, slots=True)
class SequenceTables:
    """int32 tensors on the device, padded to `size` by sequences without rows that have one key in page 0.

    `offsets` keeps the place of each sequence's row, in elements, for each distance between rows.
    """

    size: GraphSize
    num_rows: int
    num_rows_B: torch.Tensor
    num_keys_B: torch.Tensor
    first_rows_B1: torch.Tensor
    table_BW: torch.Tensor
    offsets: dict[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, owned: OwnedPages, page_size: int, device: torch.device, stage: Stage = torch.from_numpy
    ) -> SequenceTables:
        """Copied in stream order. The row of a sequence without keys counts as nobody's."""
        size = GraphSize.of(owned, page_size)
        missing = (0, size.batch - len(owned))
        rows = np.pad(np.where(owned.num_keys_B > 0, owned.num_rows_B, 0), missing)
        # Nothing ever waits for keys that are not there: every sequence has one.
        num_keys = np.pad(np.maximum(owned.num_keys_B, 1), missing, constant_values=1)
        first_rows = np.concatenate(([0], np.pad(owned.num_rows_B, missing).cumsum()))
        table = np.zeros((size.batch, size.pages), dtype=np.int32)
        known = min(size.pages, owned.page_table_BP.shape[1])
        used = np.arange(known) < -(-owned.num_keys_B[:, None] // page_size)
        table[: len(owned), :known] = np.where(used, owned.page_table_BP[:, :known], 0)
        parts = (rows, num_keys, first_rows, table)
        moved = _on_device(parts, device, stage)
        return cls(size, int(owned.num_rows_B.sum()), moved[0], moved[1], moved[2], moved[3])

    def places(self, row_stride: int) -> torch.Tensor:
        """Where each sequence's rows begin in a tensor of this distance between rows."""
        if row_stride not in self.offsets:
            self.offsets[row_stride] = self.first_rows_B1 * row_stride
        return self.offsets[row_stride]


def _on_device(parts: Sequence[np.ndarray], device: torch.device, stage: Stage) -> list[torch.Tensor]:
    """The arrays' copies, by one transfer."""
    widths = [-(-part.size // _ALIGNED) * _ALIGNED for part in parts]
    packed = np.zeros(sum(widths), dtype=np.int32)
    starts = np.cumsum([0, *widths[:-1]]).tolist()
    for start, part in zip(starts, parts, strict=True):
        packed[start : start + part.size] = part.ravel()
    moved = stage(packed).to(device, non_blocking=True)
    return [
        moved[start : start + part.size].view(part.shape) for start, part in zip(starts, parts, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class GraphShape:
    """Everything that a graph is made for. Strides are in elements: of q its rows and heads, of the pools K, P, S."""

    size: GraphSize
    heads: int
    kv_heads: int
    head_dim: int
    num_pages: int
    page_size: int
    dtype: torch.dtype
    scale: float
    window: int
    q_strides: tuple[int, int]
    pool_strides: tuple[int, int, int]

    @classmethod
    def of(
        cls, size: GraphSize, q_BNH: torch.Tensor, k_KPSH: torch.Tensor, scale: float, window: int
    ) -> GraphShape:
        kv_heads, num_pages, page_size, head_dim = k_KPSH.shape
        return cls(
            size,
            q_BNH.shape[1],
            kv_heads,
            head_dim,
            num_pages,
            page_size,
            q_BNH.dtype,
            scale,
            window,
            (q_BNH.stride(0), q_BNH.stride(1)),
            (k_KPSH.stride(0), k_KPSH.stride(1), k_KPSH.stride(2)),
        )


class AttentionCalls:
    """Attention for every shape that was asked for; graphs are kept, and made when a shape is first wanted."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[GraphShape, Any] = {}
        self._workspace = torch.empty(0, dtype=torch.uint8, device=device)

    def run(
        self,
        tables: SequenceTables,
        q_BNH: torch.Tensor,
        k_KPSH: torch.Tensor,
        v_KPSH: torch.Tensor,
        out_BNH: torch.Tensor,
        scale: float,
        window: int,
    ) -> None:
        """Writes the rows of the tables' sequences; out [B, N, H] is contiguous."""
        shape = GraphShape.of(tables.size, q_BNH, k_KPSH, scale, window)
        handle = _handle(self._device)
        graph = self._graphs.get(shape)
        if graph is None:
            graph = self._graphs[shape] = new_graph(shape, handle)
            wanted = graph.get_workspace_size()
            if wanted > self._workspace.numel():
                self._workspace = torch.empty(wanted, dtype=torch.uint8, device=self._device)
        values = {
            _Q: q_BNH,
            _K: k_KPSH,
            _V: v_KPSH,
            _OUT: out_BNH,
            _NUM_ROWS: tables.num_rows_B,
            _NUM_KEYS: tables.num_keys_B,
            _TABLE_K: tables.table_BW,
            _TABLE_V: tables.table_BW,
            _ROWS_OF_Q: tables.places(q_BNH.stride(0)),
            _ROWS_OF_OUT: tables.places(out_BNH.stride(0)),
        }
        library().set_stream(handle, torch.cuda.current_stream(self._device).cuda_stream)
        graph.execute(values, self._workspace, handle=handle)


@cache
def _calls_one_by_one(device: torch.device) -> AttentionCalls:
    """For calls that no backend plans: a graph costs more than the call."""
    return AttentionCalls(device)


@cache
def library() -> Any:
    """The package, which loads cuDNN itself."""
    return importlib.import_module("cudnn")


@cache
def _handle(device: torch.device) -> Any:
    with torch.cuda.device(device):
        return library().create_handle()


def describe(graph: Any, shape: GraphShape) -> None:
    """Puts the operation and its tensors into an empty graph."""
    cudnn, size = library(), shape.size
    dtype = getattr(cudnn.data_type, DTYPES[shape.dtype])

    def numbers(name: str, uid: int, dim: tuple[int, ...]) -> Any:
        return graph.tensor(
            name=name, dim=dim, stride=(dim[2], dim[2], 1, 1), data_type=cudnn.data_type.INT32, uid=uid
        )

    def pool(name: str, uid: int) -> Any:
        by_head, by_page, by_slot = shape.pool_strides
        dim = (shape.num_pages, shape.kv_heads, shape.page_size, shape.head_dim)
        return graph.tensor(name=name, dim=dim, stride=(by_page, by_head, by_slot, 1), data_type=dtype, uid=uid)

    by_row, by_head = shape.q_strides
    dim = (size.batch, shape.heads, 1, shape.head_dim)
    q = graph.tensor(name="q", dim=dim, stride=(by_row, by_head, by_row, 1), data_type=dtype, uid=_Q)
    q.set_ragged_offset(numbers("rows of q", _ROWS_OF_Q, (size.batch + 1, 1, 1, 1)))
    out, _ = graph.sdpa(
        name="attention",
        q=q,
        k=pool("keys", _K),
        v=pool("values", _V),
        generate_stats=False,
        attn_scale=shape.scale,
        use_padding_mask=True,
        seq_len_q=numbers("rows", _NUM_ROWS, (size.batch, 1, 1, 1)),
        seq_len_kv=numbers("keys in use", _NUM_KEYS, (size.batch, 1, 1, 1)),
        diagonal_alignment=cudnn.diagonal_alignment.BOTTOM_RIGHT,
        diagonal_band_left_bound=shape.window or None,
        diagonal_band_right_bound=0,
        paged_attention_k_table=numbers("pages of keys", _TABLE_K, (size.batch, 1, size.pages, 1)),
        paged_attention_v_table=numbers("pages of values", _TABLE_V, (size.batch, 1, size.pages, 1)),
        paged_attention_max_seq_len_kv=size.pages * shape.page_size,
    )
    row = shape.heads * shape.head_dim
    out.set_output(True).set_uid(_OUT).set_data_type(dtype)
    out.set_dim(dim).set_stride((row, shape.head_dim, row, 1))
    out.set_ragged_offset(numbers("rows of out", _ROWS_OF_OUT, (size.batch + 1, 1, 1, 1)))


def new_graph(shape: GraphShape, handle: Any) -> Any:
    """A graph that can be executed. Raises what the library raises where it has no kernel for the shape."""
    cudnn = library()
    wide = cudnn.data_type.FLOAT
    dtype = getattr(cudnn.data_type, DTYPES[shape.dtype])
    graph = cudnn.pygraph(
        io_data_type=dtype, intermediate_data_type=wide, compute_data_type=wide, handle=handle
    )
    describe(graph, shape)
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    return graph


def refuses(signature: Signature) -> str | None:
    """What cuDNN cannot serve here, as far as the library says."""
    dtype, page_size = signature["dtype"], signature["page_size"]
    if dtype not in DTYPES or signature["pool_dtype"] != dtype:
        return f"serves {' or '.join(map(str, DTYPES))}, queries and pool alike"
    if signature["soft_cap"] or signature["sinks"]:
        return "is called without soft caps and sinks here"
    if page_size & (page_size - 1):
        return f"takes pages of a power of two of tokens, not {page_size}"
    if importlib.util.find_spec("cudnn") is None:
        return "the package nvidia-cudnn-frontend is not installed"
    windows = {0, signature["window"]}
    sizes = (signature["heads"], signature["kv_heads"], signature["head_dim"])
    return next(filter(None, (_library_refuses(dtype, page_size, sizes, each) for each in windows)), None)


@cache
def _library_refuses(
    dtype: torch.dtype, page_size: int, sizes: tuple[int, int, int], window: int
) -> str | None:
    """What the library says to small graphs of this kind on the current device; None when it has kernels."""
    heads, kv_heads, head_dim = sizes
    pool_strides = (LEAST_PAGES * page_size * head_dim, page_size * head_dim, head_dim)
    rest = (heads, kv_heads, head_dim, LEAST_PAGES, page_size, dtype, 1.0, window)
    shape = GraphShape(GraphSize(1, LEAST_PAGES), *rest, (heads * head_dim, head_dim), pool_strides)
    try:
        new_graph(shape, _handle(torch.device("cuda", torch.cuda.current_device())))
    except Exception as error:
        said = str(error).strip().splitlines()[:1] or [type(error).__name__]
        return f"cuDNN has no kernel for it: {said[0]}"
    return None


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
    page_size = k_KPSH.shape[2]
    owned = OwnedPages.read(page_table_BP, None, num_keys_B)
    out_BNH.zero_()
    if owned.num_keys_B.any():
        tables = SequenceTables.of(owned, page_size, q_BNH.device)
        _calls_one_by_one(q_BNH.device).run(tables, q_BNH, k_KPSH, v_KPSH, out_BNH, scale, window)


KERNELS = (
    Kernel(
        op="attention_decode",
        provider="cudnn",
        verified_on=("NVIDIA H100",),
        function=attention_decode,
        platforms=frozenset({"cuda"}),
        features=frozenset({"sm_90"}),
        refuses=refuses,
        asks_host=True,
    ),
)
