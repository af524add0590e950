"""Lists of the eight largest keys, as Triton programs build them. Importing it imports Triton.

A list is a tuple of eight tensors: element by element, eight keys in descending order. Every comparison is a maximum
and a minimum of whole tensors, so that nothing moves between threads until lists of different lanes are merged.
Keys are integers that order like a float and then by id, the lowest first; no two are equal. Networks: Batcher, Sorting
networks and their applications, 1968.

Memory is read in the flat form [ROWS, 4 LANES], whose layout puts the lanes of a row side by side in one warp. In
[ROWS, LANES, 4] rows and lanes are equally far apart, and it depends on Triton's version which of them a warp spans:
lists of lanes in different warps meet through shared memory and barriers.
"""

from __future__ import annotations

import triton
import triton.language as tl

ID_MASK = tl.constexpr(0x1FFF)
"""A key's low bits hold ID_MASK - id. Floats of 16 bits, widened to 32, leave 13 bits free."""


@triton.jit
def key_of(x: tl.tensor, id: tl.tensor, NARROW: tl.constexpr) -> tl.tensor:
    """int32 keys of values that came from 16 bits, int64 keys of float32."""
    bits = (x.to(tl.float32) + 0.0).to(tl.int32, bitcast=True)  # Adding zero makes minus zero plus zero.
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if NARROW:
        return (ordered & ~ID_MASK) | (ID_MASK - id)
    else:
        return (ordered.to(tl.int64) << 32) | (ID_MASK - id)


@triton.jit
def id_of(key: tl.tensor) -> tl.tensor:
    """int32 id that a key was made with."""
    return ID_MASK - (key & ID_MASK).to(tl.int32)


@triton.jit
def value_of(key: tl.tensor, NARROW: tl.constexpr) -> tl.tensor:
    """float32 value that a key was made with."""
    if NARROW:
        bits = key & ~ID_MASK
        return (bits ^ ((bits >> 31) & 0x7FFFE000)).to(tl.float32, bitcast=True)
    else:
        bits = (key >> 32).to(tl.int32)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def no_key(ROWS: tl.constexpr, LANES: tl.constexpr, NARROW: tl.constexpr) -> tl.tensor:
    """Keys [ROWS, LANES] below every other."""
    if NARROW:
        return tl.full((ROWS, LANES), -(1 << 31), tl.int32)
    else:
        return tl.full((ROWS, LANES), -(1 << 63), tl.int64)


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
def best_eight(keys: tl.tuple, COUNT: tl.constexpr) -> tl.tuple:
    """The list of COUNT tensors of keys, a multiple of eight."""
    for first in tl.static_range(0, COUNT, 8):
        eight: tl.tuple = ()
        for i in tl.static_range(8):
            eight = eight + (keys[first + i],)
        if first == 0:
            best = sorted_list(eight)
        else:
            best = merged_lists(best, sorted_list(eight))
    return best


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
def merged_lanes(keys: tl.tuple) -> tl.tuple:
    """One list [ROWS] out of the lists [ROWS, LANES] of all lanes."""
    return tl.reduce(keys, 1, _merged_scalars)


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
def gathered(parts: tl.tuple, ROWS: tl.constexpr, LANES: tl.constexpr) -> tl.tensor:
    """[ROWS, 8] in the order of the list, from what was computed of its dealt parts."""
    if LANES == 8:
        return parts[0]
    elif LANES == 4:
        return tl.reshape(tl.join(parts[0], parts[1]), (ROWS, 8))
    else:
        return tl.reshape(tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3])), (ROWS, 8))


@triton.jit
def from_first(first: tl.tensor, ROWS: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """Flat [ROWS, 4 LANES]: first, first + 1 .. first + 3 of each lane. ALIGNED: every first is a multiple of 4."""
    flat = tl.reshape(first[:, :, None] + tl.arange(0, 4), (ROWS, 4 * LANES))
    if ALIGNED:
        flat = tl.max_contiguous(tl.multiple_of(flat, (1, 4)), (1, 4))
    return flat


@triton.jit
def elements(fours: tl.tensor, ROWS: tl.constexpr, LANES: tl.constexpr) -> tl.tuple:
    """The four tensors [ROWS, LANES] of a flat one."""
    even, odd = tl.split(tl.reshape(fours, (ROWS, LANES, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return (first, second, third, fourth)
