"""Contract of attention_decode_shared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lockstep.ops.attention_decode.contract import CONTRACT as DECODE
from lockstep.ops.attention_decode.reference import attention_decode
from lockstep.ops.attention_decode_shared.reference import attention_decode_shared
from lockstep.ops.attention_decode_shared.tiles import ROWS
from lockstep.ops.attention_extend.cases import Layer, paged_inputs
from lockstep.ops.cases import DTYPES
from lockstep.ops.contract import Argument, Case, Contract, Workload

_SPARE_TILES = 2
_HEADS = ((128, 128), (128, 1), (9, 1), (7, 1), (16, 2), (20, 2), (32, 2), (24, 2), (128, 2))


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences that share so many leading pages."""

    num_pages: int
    members: tuple[int, ...]


def _cases() -> Iterator[Case]:
    pairs = (Group(2, (0, 2)), Group(1, (1, 4)))
    for dtype in DTYPES:
        yield case(dtype, Layer(4, 2), (40, 17, 33, 0, 18, 5), pairs)
        yield case(dtype, Layer(4, 2), (40, 17, 33), ())
        yield case(dtype, Layer(4, 2), (), ())
        yield case(dtype, Layer(4, 2), (20,), ())
        yield case(dtype, Layer(1, 1), (200, 130, 129), (Group(8, (0, 1, 2)),))
        yield case(dtype, Layer(9, 3, sinks=True), (70, 66), (Group(4, (0, 1)),))
        yield case(dtype, Layer(12, 2, 64, 1, soft_cap=5.0), (70, 66, 80), (Group(65, (2, 0, 1)),))
        # With few keys a sink and a cap change much.
        yield case(dtype, Layer(8, 2, 64, 4, sinks=True), (9, 6, 5), (Group(1, (0, 1, 2)),))
        yield case(dtype, Layer(8, 2, 64, 4, soft_cap=3.0), (9, 6, 5), (Group(1, (0, 1, 2)),))
        yield case(dtype, Layer(5, 1, 80, 4), (70, 66), (Group(16, (1, 0)),), num_spare_pages=3)
        yield case(dtype, Layer(2, 2, 256, 64), (70, 66), (Group(1, (0, 1)),), slice_rows=True)
        yield case(dtype, Layer(4, 1, 32), (65,) * (ROWS + 3), (Group(4, tuple(range(ROWS + 3))),))
        yield case(dtype, Layer(4, 2, 64), (1500, 1030), (Group(64, (0, 1)),), pages_first=True)
        yield case(dtype, Layer(4, 2), (40, 35, 17, 1), (Group(2, (0, 1)),), unseen="NaN")
        yield case(dtype, Layer(4, 2), (40, 35), (Group(2, (0, 1)),), values="large queries")
        yield case(dtype, Layer(4, 2), (40, 35), (Group(2, (0, 1)),), values="zero queries")
        # Every number of query heads for a KV head that models have.
        for heads, kv_heads in _HEADS:
            yield case(dtype, Layer(heads, kv_heads, 32), (34, 40), (Group(2, (0, 1)),))
        if dtype != torch.float32:
            # Here float32 itself would be off by more than is accepted.
            yield case(dtype, Layer(64, 8), (150, 97, 150), (Group(6, (0, 1, 2)),), values="spread scores")


def case(
    dtype: torch.dtype, layer: Layer, num_keys: Sequence[int], groups: Sequence[Group], **options: Any
) -> Case:
    """A call with random values for sequences of so many keys; `options` are those of `paged_inputs`."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        made = paged_inputs(generator, layer, dtype, len(num_keys), num_keys, **options)
        shared_keys_B, tiles_TR = share_pages(made.page_table_BP, groups, layer.page_size)
        where = (made.k_KPSH, made.v_KPSH, made.page_table_BP, made.num_keys_B, shared_keys_B, tiles_TR)
        return made.q_TNH, *where, made.sinks_N, made.out_TNH, layer.scale, layer.soft_cap

    shared = ", ".join(f"{len(group.members)} share {group.num_pages} pages" for group in groups)
    notes = "".join(f", {name} {value}" for name, value in options.items())
    lengths = f"{len(num_keys)} sequences up to {max(num_keys, default=0)}"
    return Case(f"{dtype} {layer} {lengths}, {shared or 'none share'}{notes}", layer.signature(dtype), make)


def share_pages(
    page_table_BP: torch.Tensor, groups: Sequence[Group], page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives each group the first pages of its first member, in place; shared_keys [B] and tiles [T, R] of that."""
    shared_keys_B = torch.zeros(len(page_table_BP), dtype=torch.int32, device=page_table_BP.device)
    tiles: list[list[int]] = []
    for group in groups:
        lead, *others = group.members
        page_table_BP[others, : group.num_pages] = page_table_BP[lead, : group.num_pages].clone()
        shared_keys_B[list(group.members)] = group.num_pages * page_size
        chunks = (group.members[first : first + ROWS] for first in range(0, len(group.members), ROWS))
        tiles += [[*chunk, *[-1] * (ROWS - len(chunk))] for chunk in chunks]
    tiles += [[-1] * ROWS] * _SPARE_TILES
    return shared_keys_B, torch.tensor(tiles, dtype=torch.int32, device=page_table_BP.device)


def _alone(*given: Any) -> tuple[Any, ...]:
    """The arguments of attention_decode."""
    return *given[:5], *given[7:10], 0, given[10]


def _of_decode(mutant: Callable[..., None]) -> Callable[..., None]:
    def wrong(*given: Any) -> None:
        mutant(*_alone(*given))

    return wrong


def _with_own_tables(change: Callable[[list[int], int, int], list[int]]) -> Callable[..., None]:
    """Attention over other pages of the sequences that share: from a row's pages, its shared ones and its number."""

    def wrong(*given: Any) -> None:
        table, num_keys, shared, page_size = given[3], given[4].clone(), given[5].tolist(), given[1].shape[2]
        rows = [
            change(pages, keys // page_size, row)
            for row, (pages, keys) in enumerate(zip(table.tolist(), shared, strict=True))
        ]
        width = max((len(row) for row in rows), default=0)
        changed = table.new_full((len(rows), width), -1)
        for row, pages in enumerate(rows):
            changed[row, : len(pages)] = torch.tensor(pages)
            num_keys[row] += (len(pages) - table.shape[1]) * page_size
        attention_decode(*_alone(*given[:3], changed, num_keys, *given[5:]))

    return wrong


def _shared_by_the_first_alone(pages: list[int], shared: int, row: int) -> list[int]:
    return pages if row == 0 else pages[shared:]


def _shared_twice(pages: list[int], shared: int, row: int) -> list[int]:
    return [*pages[:shared], *pages]


def _last_shared_page_missing(pages: list[int], shared: int, row: int) -> list[int]:
    return [*pages[: max(0, shared - 1)], *pages[shared:]]


def _queries_of_the_lead(*given: Any) -> None:
    """All of a tile attend with the queries of its first sequence."""
    q_BNH = given[0].clone()
    for tile in given[6].tolist():
        members = [row for row in tile if row >= 0]
        q_BNH[members] = q_BNH[members[:1]]
    attention_decode(*_alone(q_BNH, *given[1:]))


def _second_tile_left(*given: Any) -> None:
    """Sequences of all tiles but the first see their own keys alone."""
    left = {row for tile in given[6].tolist()[1:] for row in tile}
    wrong = _with_own_tables(lambda pages, shared, row: pages[shared:] if row in left else pages)
    wrong(*given)


def _arguments() -> Iterator[Argument]:
    for argument in DECODE.arguments:
        if argument.name == "sinks":
            yield Argument("shared_keys", ("sequence",), note="int32; whole pages, fewer than num_keys; or 0")
            yield Argument(
                "tiles",
                ("tile", "row"),
                note=f"int32, {ROWS} rows: sequences that share as many keys, in the same pages; -1 for none",
            )
        if argument.name != "window":
            yield argument


def _timed(sequences: int) -> Case:
    keys = (2048 + 128,) * sequences
    return case(torch.bfloat16, Layer(32, 8, 128, 16), keys, (Group(128, tuple(range(sequences))),))


def _moved(q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, *rest: Any) -> int:
    """Queries, results, and every key and value that a sequence has: shared ones once."""
    _, num_keys, shared_keys = rest[:3]
    slot_bytes = (k_pool.nbytes + v_pool.nbytes) // (k_pool.shape[1] * k_pool.shape[2])
    return 2 * q.nbytes + slot_bytes * int((num_keys - shared_keys).sum() + shared_keys.max())


CONTRACT = Contract(
    name="attention_decode_shared",
    summary="attention_decode of sequences that share leading pages, which need be read only once",
    arguments=tuple(_arguments()),
    returns=(),
    rounding=DECODE.rounding,
    signature=DECODE.signature,
    reference=attention_decode_shared,
    cases=_cases,
    tolerance=DECODE.tolerance,
    mutants={
        "shared keys seen by the first alone": _with_own_tables(_shared_by_the_first_alone),
        "shared keys seen twice": _with_own_tables(_shared_twice),
        "last shared page missing": _with_own_tables(_last_shared_page_missing),
        "queries of a tile's first": _queries_of_the_lead,
        "second tile left out": _second_tile_left,
        **{name: _of_decode(mutant) for name, mutant in DECODE.mutants.items() if name != "window off by one"},
    },
    workload=Workload(
        "sequences of 2176 keys, 2048 of them shared, 32 heads over 8 of 128, bfloat16",
        (4, 16, 64, 128, 256),
        _timed,
        num_bytes=_moved,
    ),
    parts=("attention_decode",),
)
