"""decoder_decode on Hopper, in CUDA C++. Importing it imports NVIDIA's bindings.

Shapes: B sequences, D model, R2 half of a head, L blocks, K KV heads, P pages, S page size, H head dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import cache, partial
from math import e, log2
from pathlib import Path
from typing import Any

import torch

from lockstep.core.errors import KernelError
from lockstep.ops.cuda_program import CudaProgram, Launch, architecture_of, machine_code
from lockstep.ops.decoder_decode.hopper_shape import LAYER_BYTES, DecodeGrid, DecoderShape, grid_of, rows_served
from lockstep.ops.decoder_forward.outline import BlockOutline, DecoderOutline, ProductOutline
from lockstep.ops.hopper_attention import attention_source, tile_map

_SOURCE = Path(__file__).with_name("hopper.cu")
_THREADS = 9 * 32


class _Step(ctypes.Structure):
    """The kernel's `Step`."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "layers",
                "embedded",
                "cos",
                "sin",
                "pools",
                "table",
                "num_keys",
                "last_norm",
                "out",
                "words",
                "passes",
            )
        ),
        *((name, ctypes.c_uint64) for name in ("head_stride", "page_stride", "slot_stride")),
        *((name, ctypes.c_uint32) for name in ("rows", "table_stride")),
        *((name, ctypes.c_float) for name in ("eps", "head_eps", "scale_log2")),
    ]


class Program:
    """A decoder whose blocks one launch computes for a few rows; up to `most_rows` of them that is the best way. Serves
    one caller at a time, on one stream of its device: thread blocks of two launches at once could wait for each other.

    Takes decoders that are plain (see signature.py). Weights stay where they are.
    """

    def __init__(self, outline: DecoderOutline) -> None:
        first = outline.blocks[0]
        self._outline = outline
        self._device = outline.norm.weight.device
        self._head_eps = 0.0 if first.attention.q_norm is None else first.attention.q_norm.eps
        self._layers = torch.tensor(
            [[0 if each is None else each.data_ptr() for each in _tensors(block)] for block in outline.blocks],
            dtype=torch.int64,
        ).to(self._device)
        # The page's size does not count here.
        shape = shape_of(outline, page_size=16)
        self.most_rows = rows_served(shape, _properties(self._device).multi_processor_count)
        self._exchanges: dict[DecodeGrid, torch.Tensor] = {}

    def step(
        self,
        embedded_BD: torch.Tensor,
        cos_BR2: torch.Tensor,
        sin_BR2: torch.Tensor,
        page_table_BP: torch.Tensor,
        num_keys_B: torch.Tensor,
        kv_L2KPSH: torch.Tensor,
        cache_dir: Path | None,
    ) -> torch.Tensor:
        """See the contract. The compiled kernel is kept in `cache_dir`, if one is given.

        Raises KernelError for more rows than a kernel takes, and ValueError for a pool in another order.
        """
        outline, num_rows = self._outline, embedded_BD.shape[0]
        embedded_BD, cos_BR2, sin_BR2 = (each.contiguous() for each in (embedded_BD, cos_BR2, sin_BR2))
        out_BD = torch.empty_like(embedded_BD)
        if num_rows == 0:
            return out_BD
        pools = _heads_in_line(kv_L2KPSH)
        shape = shape_of(outline, kv_L2KPSH.shape[4])
        grid = _grid(shape, num_rows, self._device)
        exchange = self._exchanges.get(grid)
        if exchange is None:
            exchange = self._exchanges[grid] = torch.zeros(
                grid.words + 2, dtype=torch.int64, device=self._device
            )
        step = _Step(
            self._layers.data_ptr(),
            *(each.data_ptr() for each in (embedded_BD, cos_BR2, sin_BR2, pools, page_table_BP, num_keys_B)),
            outline.norm.weight.data_ptr(),
            out_BD.data_ptr(),
            # The first two words hold the number of passes: words are read in pairs.
            exchange.data_ptr() + 16,
            exchange.data_ptr(),
            *pools.stride()[:3],
            num_rows,
            page_table_BP.stride(0),
            outline.norm.eps,
            self._head_eps,
            outline.blocks[0].attention.scale * log2(e),
        )
        launch = Launch(grid.blocks, 1, _THREADS, grid.shared_bytes, early=True)
        _program(shape, grid, self._device, cache_dir).launch(launch, (tile_map(pools), step))
        return out_BD


def shape_of(outline: DecoderOutline, page_size: int) -> DecoderShape:
    """The sizes that a kernel is compiled for."""
    attention = outline.blocks[0].attention
    return DecoderShape(
        outline.hidden_size,
        outline.inner_size,
        outline.num_kv_heads,
        outline.num_heads // outline.num_kv_heads,
        outline.head_dim,
        len(outline.blocks),
        page_size,
        attention.q_norm is not None,
        attention.qkv.bias_O is not None,
    )


def source(shape: DecoderShape, grid: DecodeGrid) -> str:
    """CUDA C++ for one number of rows."""
    facts = {
        "HIDDEN": shape.hidden,
        "INNER": shape.inner,
        "KV_HEADS": shape.kv_heads,
        "GROUP": shape.group,
        "HEAD_DIM": shape.head_dim,
        "LAYERS": shape.layers,
        "PAGE": shape.page_size,
        "ROWS": grid.rows,
        "BLOCKS": grid.blocks,
        "SPLITS": grid.splits,
        "STAGES": grid.stages,
        "HELD": grid.held,
        "NORMS": int(shape.norms),
        "BIAS": int(shape.bias),
        "HALF": 0,
        "LAYER_BYTES": LAYER_BYTES,
        "STEP_BYTES": ctypes.sizeof(_Step),
    }
    return attention_source(facts, _SOURCE.read_text())


@cache
def _program(
    shape: DecoderShape, grid: DecodeGrid, device: torch.device, cache_dir: Path | None
) -> CudaProgram:
    return CudaProgram(source(shape, grid), "decode", device, cache_dir, shared_bytes=grid.shared_bytes)


def programs(shape: DecoderShape, device: torch.device, cache_dir: Path) -> Iterator[Callable[[], object]]:
    """Of each number of rows that is served, as functions that compile into `cache_dir`."""
    counts = range(1, rows_served(shape, _properties(device).multi_processor_count) + 1)
    for grid in dict.fromkeys(_grid(shape, count, device) for count in counts):
        yield partial(machine_code, source(shape, grid), architecture_of(device), cache_dir)


@cache
def _grid(shape: DecoderShape, num_rows: int, device: torch.device) -> DecodeGrid:
    properties = _properties(device)
    grid = grid_of(shape, num_rows, properties.multi_processor_count)
    if grid is None:
        raise KernelError(
            f"decoder_decode.cuda takes no {num_rows} rows of such a decoder on {properties.name}"
        )
    return grid


def _properties(device: torch.device) -> Any:
    return torch.get_device_module(device).get_device_properties(device)


def _heads_in_line(kv_L2KPSH: torch.Tensor) -> torch.Tensor:
    """Heads of keys and values of every block, one after the other: [all heads, P, S, H]."""
    try:
        return kv_L2KPSH.view(-1, *kv_L2KPSH.shape[3:])
    except RuntimeError:
        raise ValueError("the pools of all blocks must lie one after the other") from None


def _tensors(block: BlockOutline) -> tuple[torch.Tensor | None, ...]:
    """As the kernel's `Layer` has them."""
    attention, mlp = block.attention, block.mlp
    products = (attention.qkv, attention.out, mlp.gate_up, mlp.down)
    head_norms = (None if norm is None else norm.weight for norm in (attention.q_norm, attention.k_norm))
    norms = (block.input_norm.weight, block.post_norm.weight)
    return (*map(_weight, products), *norms, *head_norms, attention.qkv.bias_O)


def _weight(product: ProductOutline) -> torch.Tensor:
    (weight,) = product.weights
    assert isinstance(weight, torch.Tensor)
    return weight
