"""The Triton programs of top_k_top_p_sample. Importing it imports Triton.

Weights are integers, units of 2^-43 of the best one's: their sums are exact, so that neither the order in which they
are added nor whatever else is in the batch can change a draw. What weighs less than a unit is never drawn.

1. The best logit of each tile of a row (see argmax).
2. The weight of each tile, and for rows with filters how many of its tokens lie in each of 128 bins of scores.
3. From the bins, a bound below which no filter can leave a token. What is above, the candidates, is gathered.
4. The draw. A candidate is one int64, its score above and its id below, so that their order is the contract's: best
   first, equals by id. What filters leave is a beginning of that order; its end, and the token in whose share the draw
   falls, is the first candidate whose running sum passes a limit. It is found four bits at a time.

Shapes: R rows, V vocabulary, B tiles of a row, C bins.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.argmax.programs import (
    NUM_WARPS,
    best_of_row,
    best_of_tiles,
    packed,
    place_of,
    tile_width,
    value_of,
)
from lockstep.ops.rows import power_of_two

ROWS_AT_ONCE = 256
"""Rows whose candidates are held at a time: 311 MB at a vocabulary of 151936."""

CHUNK = 1024
"""Candidates that are compared with all bounds of a digit at a time."""

_UNIT = tl.constexpr(2.0**43)
_BINS = tl.constexpr(128)
_BINS_PER_SCORE = tl.constexpr(4.0)
"""The last bin takes what lies 31.75 or more below the best: less than a unit, e^-29.8."""
_SLACK = tl.constexpr(1.001)
"""More than the float32 sums of what bins may weigh are off."""
_ID_BITS = tl.constexpr(19)
_DIGITS = tl.constexpr(13)
"""Of four bits each, for 31 bits of the score and those of the id."""
_ID_MASK = tl.constexpr(0x7FFFF)
_NOBODY = tl.constexpr((0x7F800000 << 19) | 0x7FFFF)
"""Behind every candidate, with a score of minus infinity."""
_NO_SCORE = tl.constexpr(float("-inf"))


@triton.jit
def _is_filtered(top_k: tl.tensor, top_p: tl.tensor, min_p: tl.tensor) -> tl.tensor:
    """False also where top_k is 1: such a row takes the best."""
    return (top_k != 1) & ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0))


@triton.jit
def _scores(
    row_ptr: tl.tensor, token: tl.tensor, vocab_size: tl.tensor, best: tl.tensor, temperature: tl.tensor
) -> tl.tensor:
    """Logits below the best one over the temperature, float32; minus infinity where there is no token or number."""
    logits = tl.load(row_ptr + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    # As the reference divides: scores that differ there must differ here.
    scores = tl.div_rn(logits - best, tl.zeros_like(logits) + tl.maximum(temperature, 1.1754943508222875e-38))
    return tl.where(scores <= 0.0, scores, _NO_SCORE)


@triton.jit
def _weights(scores: tl.tensor) -> tl.tensor:
    """exp(score) in units, int64."""
    return (tl.exp(scores) * _UNIT).to(tl.int64)


@triton.jit
def _bins(scores: tl.tensor) -> tl.tensor:
    return tl.minimum(-scores * _BINS_PER_SCORE, _BINS - 1.0).to(tl.int32)


@triton.jit
def _weigh(
    logits_ptr: tl.tensor,
    best_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    num_tiles: tl.tensor,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """The weight of a tile, and its counts where there are filters."""
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    top_k = tl.load(top_k_ptr + row)
    if top_k != 1:
        token = tl.program_id(0) % num_tiles * BLOCK + tl.arange(0, BLOCK)
        best = value_of(best_of_row(best_ptr, row, num_tiles, TILES))
        temperature = tl.load(temperature_ptr + row)
        scores = _scores(logits_ptr + row * row_stride, token, vocab_size, best, temperature)
        tl.store(sums_ptr + tl.program_id(0), tl.sum(_weights(scores), 0))
        if _is_filtered(top_k, tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)):
            counts = tl.histogram(_bins(scores), _BINS)
            tl.store(counts_ptr + tl.program_id(0).to(tl.int64) * _BINS + tl.arange(0, _BINS), counts)


@triton.jit
def _num_bins_kept(
    counts: tl.tensor, total: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, min_p: tl.tensor
) -> tl.tensor:
    """How many bins, from the best, hold whatever the filters can leave; top-k alone decides where it is on.

    top-p takes its share of what top-k leaves, so all of that must be known.
    """
    bin_ = tl.arange(0, _BINS)
    most = tl.exp(-bin_.to(tl.float32) / _BINS_PER_SCORE) * _SLACK
    # A token is left by top-p when it and all behind it weigh more than the rest of the total.
    behind = tl.cumsum(counts.to(tl.float32) * most, 0, reverse=True)
    by_top_p = behind > (1.0 - top_p) * (total.to(tl.float32) / _UNIT)
    by_min_p = most >= min_p
    by_top_k = tl.cumsum(counts, 0) - counts < top_k
    kept = tl.where(top_k > 0, by_top_k, by_top_p & by_min_p)
    return tl.minimum(tl.sum(kept.to(tl.int32), 0), _BINS - 1)


@triton.jit
def _gather(
    logits_ptr: tl.tensor,
    best_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    candidates_ptr: tl.tensor,
    num_candidates_ptr: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    num_tiles: tl.tensor,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """Puts a tile's candidates behind those of the tiles before it."""
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    own = tl.program_id(0) % num_tiles
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    if _is_filtered(top_k, top_p, min_p):
        tile = tl.arange(0, TILES)
        total = tl.sum(tl.load(sums_ptr + row * num_tiles + tile, mask=tile < num_tiles, other=0), 0)
        bin_ = tl.arange(0, _BINS)
        at = (row * num_tiles + tile)[:, None] * _BINS + bin_[None, :]
        counts = tl.load(counts_ptr + at, mask=(tile < num_tiles)[:, None], other=0)
        num_bins = _num_bins_kept(tl.sum(counts, 0), total, top_k, top_p, min_p)
        kept = tl.sum(tl.where((bin_ < num_bins)[None, :], counts, 0), 1)
        first = tl.sum(tl.where(tile < own, kept, 0), 0)
        if own == 0:
            tl.store(num_candidates_ptr + row, tl.sum(kept, 0))

        token = own * BLOCK + tl.arange(0, BLOCK)
        best = value_of(best_of_row(best_ptr, row, num_tiles, TILES))
        temperature = tl.load(temperature_ptr + row)
        scores = _scores(logits_ptr + row * row_stride, token, vocab_size, best, temperature)
        is_kept = _bins(scores) < num_bins
        place = first + tl.cumsum(is_kept.to(tl.int32), 0) - 1
        # Scores are zero or less: the bits of their absolute values are in the order of best first.
        rank = (-scores).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        candidates = (rank.to(tl.int64) << _ID_BITS) | token.to(tl.int64)
        tl.store(candidates_ptr + row * vocab_size + place, candidates, mask=is_kept)


@triton.jit
def _weights_of(candidates: tl.tensor) -> tl.tensor:
    return _weights(-(candidates >> _ID_BITS).to(tl.int32).to(tl.float32, bitcast=True))


@triton.jit
def _first_past(
    row_ptr: tl.tensor, num: tl.tensor, limit: tl.tensor, BY_COUNT: tl.constexpr, CHUNK: tl.constexpr
) -> tl.tensor:
    """The first candidate, best first, up to which there are more than `limit` candidates, or units of weight.

    Something behind all of them where there are not.
    """
    digit = tl.arange(0, 16).to(tl.int64)
    found = tl.zeros_like(limit)
    for place in range(_DIGITS):
        shift = 4 * (_DIGITS - 1 - place)
        # What comes before the candidates that begin with a higher digit.
        bounds = found + ((digit + 1) << shift)
        sums = tl.zeros((16,), tl.int64)
        for start in range(0, num, CHUNK):
            at = start + tl.arange(0, CHUNK)
            candidates = tl.load(row_ptr + at, mask=at < num, other=_NOBODY)
            if BY_COUNT:
                values = (at < num).to(tl.int64)
            else:
                values = _weights_of(candidates)
            sums += tl.sum(tl.where(candidates[None, :] < bounds[:, None], values[None, :], 0), 1)
        passed_by = tl.sum((sums <= limit).to(tl.int64), 0)
        found += passed_by << shift
    return found


@triton.jit
def _weight_up_to(
    row_ptr: tl.tensor, num: tl.tensor, last: tl.tensor, least: tl.tensor, CHUNK: tl.constexpr
) -> tl.tensor:
    """What the candidates weigh up to the one called `last`, without those that weigh less than `least` of the best."""
    sums = tl.zeros((CHUNK,), tl.int64)
    for start in range(0, num, CHUNK):
        at = start + tl.arange(0, CHUNK)
        candidates = tl.load(row_ptr + at, mask=at < num, other=_NOBODY)
        weights = _weights_of(candidates)
        is_in = (candidates <= last) & (weights.to(tl.float32) >= least * _UNIT)
        sums += tl.where(is_in, weights, 0)
    return tl.sum(sums, 0)


@triton.jit
def _limit(draw: tl.tensor, total: tl.tensor) -> tl.tensor:
    """The running sum, in whole units, that a draw's token is the first to pass. Rounding never takes it to the end."""
    return tl.maximum(tl.minimum((draw * total.to(tl.float64)).to(tl.int64), total - 1), 0)


@triton.jit
def _draw(
    logits_ptr: tl.tensor,
    best_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    draw_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    candidates_ptr: tl.tensor,
    num_candidates_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    num_tiles: tl.tensor,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """The token of a row."""
    row = tl.program_id(0).to(tl.int64)
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    best = best_of_row(best_ptr, row, num_tiles, TILES)
    token_id = place_of(best)
    if top_k != 1:
        draw = tl.load(draw_ptr + row)
        tile = tl.arange(0, TILES)
        sums = tl.load(sums_ptr + row * num_tiles + tile, mask=tile < num_tiles, other=0)
        total = tl.sum(sums, 0)
        if _is_filtered(top_k, top_p, min_p):
            row_ptr = candidates_ptr + row * vocab_size
            num = tl.load(num_candidates_ptr + row)
            last = tl.full((), _NOBODY, tl.int64)
            if (top_k > 0) & (top_k < vocab_size):
                last = _first_past(row_ptr, num, top_k - 1, True, CHUNK)
                total = _weight_up_to(row_ptr, num, last, 0.0, CHUNK)
            if top_p < 1.0:
                share = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
                last = tl.minimum(last, _first_past(row_ptr, num, tl.minimum(share, total) - 1, False, CHUNK))
            total = _weight_up_to(row_ptr, num, last, min_p, CHUNK)
            found = _first_past(row_ptr, num, _limit(draw, total), False, CHUNK)
            token_id = found & _ID_MASK
        else:
            limit = _limit(draw, total)
            passed = tl.cumsum(sums, 0) <= limit
            own = tl.minimum(tl.sum(passed.to(tl.int32), 0), num_tiles - 1)
            limit -= tl.sum(tl.where(tile < own, sums, 0), 0)
            token = own * BLOCK + tl.arange(0, BLOCK)
            temperature = tl.load(temperature_ptr + row)
            scores = _scores(logits_ptr + row * row_stride, token, vocab_size, value_of(best), temperature)
            passed = tl.cumsum(_weights(scores), 0) <= limit
            token_id = own.to(tl.int64) * BLOCK + tl.sum(passed.to(tl.int32), 0)
    # Logits that are no numbers leave nothing to draw from; an id must name a token all the same.
    tl.store(token_ids_ptr + row, tl.minimum(token_id, vocab_size - 1))


def sample(
    logits_RV: torch.Tensor,
    temperature_R: torch.Tensor,
    top_k_R: torch.Tensor,
    top_p_R: torch.Tensor,
    min_p_R: torch.Tensor,
    draw_R: torch.Tensor,
) -> torch.Tensor:
    """See the contract."""
    logits_RV = packed(logits_RV)
    token_ids_R = torch.empty(len(logits_RV), dtype=torch.int64, device=logits_RV.device)
    for first in range(0, len(logits_RV), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        columns = (temperature_R, top_k_R, top_p_R, min_p_R, draw_R)
        limits = tuple(column[rows].contiguous() for column in columns)
        _sample(logits_RV[rows], limits, token_ids_R[rows])
    return token_ids_R


def _sample(logits_RV: torch.Tensor, limits: tuple[torch.Tensor, ...], token_ids_R: torch.Tensor) -> None:
    def scratch(*sizes: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(*sizes, dtype=dtype, device=logits_RV.device)

    *filters, draw_R = limits
    best_RB = best_of_tiles(logits_RV)
    (num_rows, num_tiles), vocab_size = best_RB.shape, logits_RV.shape[1]
    sums_RB = scratch(num_rows, num_tiles)
    counts_RBC = scratch(num_rows, num_tiles, _BINS.value, dtype=torch.int32)
    candidates = (scratch(num_rows, vocab_size), scratch(num_rows, dtype=torch.int32))
    given = (logits_RV, best_RB, *filters)
    sizes = (logits_RV.stride(0), vocab_size, num_tiles)
    tiles = {"BLOCK": tile_width(vocab_size), "TILES": power_of_two(num_tiles), "num_warps": NUM_WARPS}
    programs = (num_rows * num_tiles,)
    _weigh[programs](*given, sums_RB, counts_RBC, *sizes, **tiles)
    _gather[programs](*given, sums_RB, counts_RBC, *candidates, *sizes, **tiles)
    _draw[(num_rows,)](*given, draw_R, sums_RB, *candidates, token_ids_R, *sizes, **tiles, CHUNK=CHUNK)
