"""Lists of the eight largest keys, as Triton programs build them. Importing it imports Triton.

A list is a tuple of eight tensors: element by element, eight keys in descending order. Every comparison is a maximum
and a minimum of whole tensors, so that nothing moves between threads until lists of different lanes are merged.
Networks: Batcher, Sorting networks and their applications, 1968.

Keys are integers that order like a float and then by id, the lowest first; no two are equal. A wide key holds the whole
float. A short one takes a third of the instructions; its id takes the place of the float's last bits. Floats of 16 bits
leave that many bits free. Of others `is_near`, `is_crowded` and `has_lost` tell when it may matter, and wide keys
are needed after all.

Tensors [ROWS, LANES] lie with a few lanes, threads of one warp, to each row. Memory is read as it lies instead, whole
rows by neighbouring threads; `apart` takes what came of it to the lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_of(x: tl.tensor, id: tl.tensor, ID_MASK: tl.constexpr, WIDE: tl.constexpr) -> tl.tensor:
    """int32 keys, or int64 ones where WIDE. ids are at most ID_MASK, a power of two less one."""
    bits = (x.to(tl.float32) + 0.0).to(tl.int32, bitcast=True)  # Adding zero makes minus zero plus zero.
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if WIDE:
        return (ordered.to(tl.int64) << 32) | (ID_MASK - id)
    else:
        return (ordered & ~ID_MASK) | (ID_MASK - id)


@triton.jit
def id_of(key: tl.tensor, ID_MASK: tl.constexpr) -> tl.tensor:
    """int32 id that a key was made with."""
    return ID_MASK - (key & ID_MASK).to(tl.int32)


@triton.jit
def ids_of(keys: tl.tuple, EXPERTS: tl.constexpr, ID_MASK: tl.constexpr, COUNT: tl.constexpr) -> tl.tuple:
    """Experts of COUNT tensors of keys. Logits that are no numbers may let padding win: those name one all the same."""
    ids: tl.tuple = ()
    for i in tl.static_range(COUNT):
        ids = ids + (tl.minimum(id_of(keys[i], ID_MASK), EXPERTS - 1),)
    return ids


@triton.jit
def value_of(key: tl.tensor, ID_MASK: tl.constexpr) -> tl.tensor:
    """float32 value that a short key was made with, without what was lost."""
    bits = key & ~ID_MASK
    return (bits ^ ((bits >> 31) & (0x7FFFFFFF & ~ID_MASK))).to(tl.float32, bitcast=True)


@triton.jit
def no_key(ROWS: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr) -> tl.tensor:
    """Keys [ROWS, LANES] below every other."""
    if WIDE:
        return tl.full((ROWS, LANES), -(1 << 63), tl.int64)
    else:
        return tl.full((ROWS, LANES), -(1 << 31), tl.int32)


@triton.jit
def has_lost(values: tl.tuple, COUNT: tl.constexpr, ID_MASK: tl.constexpr) -> tl.tensor:
    """Whether short keys hold less than COUNT tensors of one shape did, a scalar."""
    bits = values[0].to(tl.int32, bitcast=True)
    for i in tl.static_range(1, COUNT):
        bits |= values[i].to(tl.int32, bitcast=True)
    return tl.max(bits & ID_MASK) != 0


@triton.jit
def _gap(key: tl.tensor, other: tl.tensor) -> tl.tensor:
    """How many integers lie between a key and one below it, uint32; very many where the other is not below."""
    return (key - 1 - other).to(tl.uint32, bitcast=True)


@triton.jit
def is_near(key: tl.tensor, others: tl.tuple, COUNT: tl.constexpr, ID_MASK: tl.constexpr) -> tl.tensor:
    """Whether one of COUNT tensors [ROWS, ...] of short keys may be below key [ROWS] for its id alone, a scalar."""
    smallest = _gap(key[:, None], others[0])
    for i in tl.static_range(1, COUNT):
        smallest = tl.minimum(smallest, _gap(key[:, None], others[i]))
    return tl.min(smallest) <= ID_MASK


@triton.jit
def is_crowded(list: tl.tuple, COUNT: tl.constexpr, ID_MASK: tl.constexpr) -> tl.tensor:
    """Whether one of the first COUNT short keys of a list may be below the one before for its id alone, a scalar."""
    smallest = tl.full(list[0].shape, 0xFFFFFFFF, tl.uint32)
    for i in tl.static_range(COUNT - 1):
        smallest = tl.minimum(smallest, _gap(list[i], list[i + 1]))
    return tl.min(smallest) <= ID_MASK


@triton.jit
def _after_meeting(keys: tl.tuple, AT: tl.constexpr, PARTNER: tl.constexpr) -> tl.tensor:
    """Key AT after it met its partner: the larger of both goes to the lower number. Its own partner stays.

    Wide keys have no instruction for a minimum, but what is left of two keys without the larger one takes two.
    """
    if PARTNER > AT:
        return tl.maximum(keys[AT], keys[PARTNER])
    elif PARTNER < AT:
        if keys[AT].dtype == tl.int64:
            return keys[AT] ^ keys[PARTNER] ^ tl.maximum(keys[PARTNER], keys[AT])
        else:
            return tl.minimum(keys[AT], keys[PARTNER])
    else:
        return keys[AT]


@triton.jit
def _exchanged(keys: tl.tuple, PARTNERS: tl.constexpr) -> tl.tuple:
    """Every key after it met its partner. The digits of PARTNERS are the partners of keys 0 to 7."""
    out: tl.tuple = ()
    for i in tl.static_range(8):
        out = out + (_after_meeting(keys, i, (PARTNERS >> 4 * (7 - i)) & 7),)
    return out


@triton.jit
def sorted_list(keys: tl.tuple) -> tl.tuple:
    """Eight tensors of keys in descending order: pairs, then fours, then all, by Batcher's odd-even merges."""
    keys = _exchanged(keys, 0x10325476)
    keys = _exchanged(_exchanged(keys, 0x23016745), 0x02134657)
    return _exchanged(_exchanged(_exchanged(keys, 0x45670123), 0x01452367), 0x02143657)


@triton.jit
def merged_lists(a: tl.tuple, b: tl.tuple) -> tl.tuple:
    """The eight largest of two lists. The larger of each pair, one list reversed, fall and rise at most once each."""
    keys: tl.tuple = ()
    for i in tl.static_range(8):
        keys = keys + (tl.maximum(a[i], b[7 - i]),)
    return _exchanged(_exchanged(_exchanged(keys, 0x45670123), 0x23016745), 0x10325476)


@triton.jit
def _merged_scalars(
    a0: tl.tensor,
    a1: tl.tensor,
    a2: tl.tensor,
    a3: tl.tensor,
    a4: tl.tensor,
    a5: tl.tensor,
    a6: tl.tensor,
    a7: tl.tensor,
    b0: tl.tensor,
    b1: tl.tensor,
    b2: tl.tensor,
    b3: tl.tensor,
    b4: tl.tensor,
    b5: tl.tensor,
    b6: tl.tensor,
    b7: tl.tensor,
) -> tuple[tl.tensor, ...]:
    m = merged_lists((a0, a1, a2, a3, a4, a5, a6, a7), (b0, b1, b2, b3, b4, b5, b6, b7))
    return m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7]


@triton.jit
def best_eight(keys: tl.tuple, COUNT: tl.constexpr) -> tl.tuple:
    """One list [ROWS] of COUNT tensors of keys [ROWS, LANES]."""
    for first in tl.static_range(0, COUNT, 8):
        eight: tl.tuple = ()
        for i in tl.static_range(8):
            if first + i < COUNT:
                eight = eight + (keys[first + i],)
            else:
                eight = eight + (no_key(keys[0].shape[0], keys[0].shape[1], keys[0].dtype == tl.int64),)
        if first == 0:
            best = sorted_list(eight)
        else:
            best = merged_lists(best, sorted_list(eight))
    return tl.reduce(best, 1, _merged_scalars)


@triton.jit
def dealt(list: tl.tuple, lane: tl.tensor, LANES: tl.constexpr) -> tl.tuple:
    """A list [ROWS] dealt out to the lanes: 8 / LANES tensors [ROWS, LANES], consecutive ones to each lane."""
    EACH: tl.constexpr = 8 // LANES
    out: tl.tuple = ()
    for i in tl.static_range(EACH):
        mine = list[i][:, None]
        for other in tl.static_range(1, LANES):
            mine = tl.where(lane == other, list[other * EACH + i][:, None], mine)
        out = out + (tl.broadcast_to(mine, (mine.shape[0], LANES)),)
    return out


@triton.jit
def apart(x: tl.tensor, ROWS: tl.constexpr, LANES: tl.constexpr, COUNT: tl.constexpr) -> tl.tuple:
    """COUNT tensors [ROWS, LANES] of [ROWS, LANES * COUNT]: the COUNT columns of each lane."""
    if COUNT == 1:
        return (x,)
    else:
        even, odd = tl.split(tl.reshape(x, (ROWS, LANES * COUNT // 2, 2)))
        evens = apart(even, ROWS, LANES, COUNT // 2)
        odds = apart(odd, ROWS, LANES, COUNT // 2)
        out: tl.tuple = ()
        for i in tl.static_range(COUNT // 2):
            out = out + (evens[i], odds[i])
        return out


@triton.jit
def taken_in_turn(
    x: tl.tensor, ROWS: tl.constexpr, LANES: tl.constexpr, COUNT: tl.constexpr, RUN: tl.constexpr
) -> tl.tuple:
    """COUNT tensors [ROWS, LANES] of [ROWS, COUNT * LANES]: RUN columns to each lane, then the next ones to each."""
    by_lane = tl.permute(tl.reshape(x, (ROWS, COUNT // RUN, LANES, RUN)), (0, 2, 1, 3))
    return apart(tl.reshape(by_lane, (ROWS, LANES * COUNT)), ROWS, LANES, COUNT)


@triton.jit
def together(parts: tl.tuple, ROWS: tl.constexpr, LANES: tl.constexpr, COUNT: tl.constexpr) -> tl.tensor:
    """[ROWS, LANES * COUNT] of COUNT tensors [ROWS, LANES]: the reverse of `apart`."""
    if COUNT == 1:
        return parts[0]
    else:
        evens: tl.tuple = ()
        odds: tl.tuple = ()
        for i in tl.static_range(COUNT // 2):
            evens = evens + (parts[2 * i],)
            odds = odds + (parts[2 * i + 1],)
        even = together(evens, ROWS, LANES, COUNT // 2)
        odd = together(odds, ROWS, LANES, COUNT // 2)
        return tl.reshape(tl.join(even, odd), (ROWS, LANES * COUNT))


@triton.jit
def from_first(first: tl.tensor, ROWS: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """Flat [ROWS, 4 LANES]: first, first + 1 .. first + 3 of each lane. ALIGNED: every first is a multiple of 4."""
    flat = tl.reshape(first[:, :, None] + tl.arange(0, 4), (ROWS, 4 * LANES))
    if ALIGNED:
        flat = tl.max_contiguous(tl.multiple_of(flat, (1, 4)), (1, 4))
    return flat


@triton.jit
def rows_of_program(
    num_tokens: tl.tensor, FULL: tl.constexpr, ROWS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The program's first token, int64, and its rows counted from there.

    If there are ROWS tokens (FULL), the last program begins early enough to be full and repeats what others do.
    Otherwise there is one program, and its rows past the last token repeat that one.
    """
    row = tl.arange(0, ROWS)
    if FULL:
        return tl.minimum(tl.program_id(0) * ROWS, num_tokens - ROWS).to(tl.int64), row
    else:
        return tl.program_id(0).to(tl.int64), tl.minimum(row, num_tokens - 1)


@triton.jit
def row_offsets(
    first: tl.tensor, row: tl.tensor, stride: tl.tensor, EXPERTS: tl.constexpr, DENSE: tl.constexpr
) -> tl.tensor:
    """Where rows begin. DENSE: their distance is known when the program is compiled, so that one address serves all."""
    if DENSE:
        return first * EXPERTS + row * EXPERTS
    else:
        return first * stride + row.to(tl.int64) * stride


@triton.jit
def store_choices(
    out_ptr: tl.tensor,
    values: tl.tensor,
    first: tl.tensor,
    num_tokens: tl.tensor,
    TOP_K: tl.constexpr,
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """The first TOP_K of [ROWS, 8] values, to rows of TOP_K."""
    row = tl.arange(0, ROWS)[:, None]
    choice = tl.arange(0, 8)[None, :]
    mask = choice < TOP_K
    if not FULL:
        mask = mask & (row < num_tokens)
    tl.store(out_ptr + first * TOP_K + row * TOP_K + choice, values, mask=mask)
