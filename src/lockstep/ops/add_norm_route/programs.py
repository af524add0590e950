"""The Triton program of add_norm_route. Importing it imports Triton.

Shapes: T rows, D model, E experts, K experts of each row, P parts of the inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.add_norm_route.tiles import Tile
from lockstep.ops.arrivals import arrives_last, counters_of
from lockstep.ops.dependent_launch import dependent_launch, wait_for_inputs
from lockstep.ops.linear.programs import load_weight
from lockstep.ops.moe_topk_softmax.lists import id_of, key_of, no_key, value_of
from lockstep.ops.moe_topk_softmax.tiles import id_mask, power_of_two_from


@triton.jit
def _stream(
    update_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    row: tl.tensor,
    input: tl.tensor,
    update_row_stride: tl.tensor,
    residual_row_stride: tl.tensor,
    mask: tl.tensor,
) -> tl.tensor:
    """[input, row] of the new stream, in its dtype; zeros where the mask says no."""
    place = row[None, :] * residual_row_stride + input[:, None]
    total = tl.load(residual_ptr + place, mask=mask, other=0.0)
    if update_ptr is not None:
        place = row[None, :] * update_row_stride + input[:, None]
        update = tl.load(update_ptr + place, mask=mask, other=0.0)
        total = (total.to(tl.float32) + update.to(tl.float32)).to(total.dtype)
    return total


@triton.jit
def _sum_of_parts(
    partial_ptr: tl.tensor,
    num_rows: tl.tensor,
    PARTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
) -> tl.tensor:
    """Float32 logits [ROWS, PLACES] that other programs stored in parts, added in their order."""
    row = tl.arange(0, ROWS).to(tl.int64)[:, None]
    expert = tl.arange(0, PLACES)[None, :]
    mask = (row < num_rows) & (expert < EXPERTS)
    total = tl.zeros((ROWS, PLACES), tl.float32)
    for part in tl.static_range(PARTS):
        part_ptr = partial_ptr + part * num_rows.to(tl.int64) * EXPERTS
        total += tl.load(part_ptr + row * EXPERTS + expert, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def _choose(
    logits: tl.tensor,
    weights_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    num_rows: tl.tensor,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    ID_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
) -> None:
    """The best experts of float32 logits that 16 bits hold: short keys order all of them. See moe_topk_softmax.

    Choices are kept in the first places of tensors [ROWS, PLACES] like the logits', so that nothing changes its layout.
    """
    place = tl.arange(0, PLACES)[None, :]
    is_choice = place < TOP_K
    logits = tl.where(place < EXPERTS, logits, float("-inf"))
    keys = key_of(logits, place, ID_MASK, False)
    best = no_key(ROWS, PLACES, False)
    for turn in tl.static_range(TOP_K):
        found = tl.max(keys, 1)[:, None]
        if turn == 0:
            largest = value_of(found, ID_MASK)
        best = tl.where(place == turn, found, best)
        keys = tl.where(keys == found, -(1 << 31), keys)
    chosen = tl.where(is_choice, value_of(best, ID_MASK), float("-inf"))
    shares = tl.exp(chosen - largest)
    if RENORMALISE:
        whole = tl.sum(shares, 1)[:, None]
    else:
        whole = tl.sum(tl.exp(logits - largest), 1)[:, None]
    row = tl.arange(0, ROWS).to(tl.int64)[:, None]
    mask = (row < num_rows) & is_choice
    tl.store(weights_ptr + row * TOP_K + place, shares / whole, mask=mask)
    # Logits that are no numbers may let padding win: those name an expert all the same.
    tl.store(ids_ptr + row * TOP_K + place, tl.minimum(id_of(best, ID_MASK), EXPERTS - 1), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _normalise_and_route(
    update_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    router_ptr: tl.tensor,
    normed_ptr: tl.tensor,
    total_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    counter_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    num_rows: tl.tensor,
    update_row_stride: tl.tensor,
    residual_row_stride: tl.tensor,
    router_row_stride: tl.tensor,
    eps: tl.tensor,
    INPUTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    ID_MASK: tl.constexpr,
    PLACES: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_EXPERTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """TILE_EXPERTS logits of all rows, of one part of the inputs. Whoever comes last adds the parts and chooses.

    The first programs of each part write its columns of the new stream and of the normalised rows.
    """
    expert = tl.program_id(0) * TILE_EXPERTS + tl.arange(0, TILE_EXPERTS)
    part = tl.program_id(1)
    input = part * TILE_INPUTS + tl.arange(0, TILE_INPUTS)
    row = tl.arange(0, ROWS).to(tl.int64)
    # On their way before anything is waited for; what lies beyond the experts is computed, and not stored.
    read = tl.minimum(expert, EXPERTS - 1)
    weight = load_weight(
        router_ptr, read, part * TILE_INPUTS, INPUTS, router_row_stride, TILE_INPUTS, INPUTS % TILE_INPUTS == 0
    )
    norm_weight = tl.load(norm_weight_ptr + input, mask=input < INPUTS, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)

    is_row = (row < num_rows)[None, :]
    mask = is_row & (input < INPUTS)[:, None]
    total = _stream(update_ptr, residual_ptr, row, input, update_row_stride, residual_row_stride, mask)
    squares = tl.zeros((TILE_INPUTS, ROWS), tl.float32)
    for first in tl.static_range(0, INPUTS, TILE_INPUTS):
        every = first + tl.arange(0, TILE_INPUTS)
        every_mask = is_row & (every < INPUTS)[:, None]
        x = _stream(update_ptr, residual_ptr, row, every, update_row_stride, residual_row_stride, every_mask)
        squares += x.to(tl.float32) * x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(squares, axis=0) / INPUTS + eps)
    # Rounded as the rows that experts read are: logits differ from those of single operators for their sums alone.
    normed = (total.to(tl.float32) * scale[None, :] * norm_weight[:, None]).to(total.dtype)
    place = row[None, :] * INPUTS + input[:, None]
    is_owned = mask & (row < tl.where(tl.program_id(0) == 0, num_rows, 0))[None, :]
    tl.store(total_ptr + place, total, mask=is_owned)
    tl.store(normed_ptr + place, normed, mask=is_owned)

    logits = tl.dot(weight, normed)
    part_ptr = partial_ptr + part * num_rows.to(tl.int64) * EXPERTS
    tl.store(
        part_ptr + row[None, :] * EXPERTS + expert[:, None], logits, mask=is_row & (expert < EXPERTS)[:, None]
    )
    if arrives_last(counter_ptr, tl.num_programs(0) * tl.num_programs(1)):
        whole = _sum_of_parts(partial_ptr, num_rows, PARTS, EXPERTS, ROWS, PLACES)
        rounded = whole.to(normed_ptr.dtype.element_ty).to(tl.float32)
        _choose(rounded, weights_ptr, ids_ptr, num_rows, EXPERTS, TOP_K, RENORMALISE, ID_MASK, ROWS, PLACES)


def normalise_and_route(
    update_TD: torch.Tensor | None,
    residual_TD: torch.Tensor,
    norm: tuple[torch.Tensor, float],
    router_ED: torch.Tensor,
    top_k: int,
    renormalise: bool,
    tile: Tile,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the contract of add_norm_route, for at most `tile.rows` rows whose elements lie side by side."""
    num_rows, inputs = residual_TD.shape
    num_experts = router_ED.shape[0]
    num_parts = triton.cdiv(inputs, tile.inputs)
    norm_weight_D, eps = norm
    normed_TD, total_TD = (residual_TD.new_empty((num_rows, inputs)) for _ in range(2))
    partial_PTE = residual_TD.new_empty((num_parts, num_rows, num_experts), dtype=torch.float32)
    weights_TK = residual_TD.new_empty((num_rows, top_k), dtype=torch.float32)
    ids_TK = residual_TD.new_empty((num_rows, top_k), dtype=torch.int32)
    _normalise_and_route[(triton.cdiv(num_experts, tile.experts), num_parts)](
        update_TD,
        residual_TD,
        norm_weight_D,
        router_ED,
        normed_TD,
        total_TD,
        partial_PTE,
        counters_of(residual_TD.device),
        weights_TK,
        ids_TK,
        num_rows,
        0 if update_TD is None else update_TD.stride(0),
        residual_TD.stride(0),
        router_ED.stride(0),
        eps,
        INPUTS=inputs,
        EXPERTS=num_experts,
        TOP_K=top_k,
        RENORMALISE=renormalise,
        ID_MASK=id_mask(num_experts),
        PLACES=power_of_two_from(num_experts),
        ROWS=tile.rows,
        TILE_EXPERTS=tile.experts,
        TILE_INPUTS=tile.inputs,
        PARTS=num_parts,
        num_warps=tile.num_warps,
        **dependent_launch(),
    )
    return normed_TD, total_TD, weights_TK, ids_TK
