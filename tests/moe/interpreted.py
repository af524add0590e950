"""Checks Triton kernels of mixtures of experts in Triton's interpreter: `python interpreted.py OPERATOR...`.

OPERATOR/WAY computes every number of tokens in one way, whatever the rules would choose. Operators with products run
in the dtypes other than bfloat16. Exits 1 on a failure.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

sys.path.append(str(Path(__file__).parents[1] / "ops_basic"))

import torch
import triton_interpreter  # noqa: F401  has Triton interpreted

from lockstep.ops.check import check_kernel
from lockstep.ops.contract import Case, Contract
from lockstep.ops.registry import contracts, kernels

SEED = 4
EVERY = {
    "moe_topk_softmax": 16,
    "moe_topk_sigmoid": 20,
    "moe_align": 2,
    "grouped_gemm": 2,
    "fused_moe": 5,
    "add_norm_route": 5,
}
"""Which share of the cases runs; strides and dtypes are no multiples of these, so that each comes up."""


def chosen_cases(contract: Contract) -> Iterator[Case]:
    has_products = contract.name in ("grouped_gemm", "fused_moe", "add_norm_route")
    cases = [
        case for case in contract.cases() if not (has_products and case.signature["dtype"] == torch.bfloat16)
    ]
    yield from cases[:: EVERY[contract.name]]
    yield from [case for case in cases if "crowded" in case.name][:1]


def check(contract: Contract) -> None:
    triton = next(kernel for kernel in kernels(contract.name) if kernel.provider == "triton")
    report = check_kernel(contract, triton, seed=SEED)
    print(f"seed {SEED}: {report.num_cases} cases, worst {report.worst_share:.2f} in {report.worst_case}")
    assert report.passed, report.failures or "no case ran"


def check_lanes(contract: Contract) -> None:
    """The widths that only tens of thousands of tokens would choose."""
    programs = importlib.import_module(f"lockstep.ops.{contract.name}.programs")
    cases = list(contract.cases())[1::25]
    crowded = next(case for case in contract.cases() if "crowded" in case.name)
    for number, lanes in enumerate((2, 4)):
        some = [*cases[number::2], crowded]
        with patch.object(programs, "lanes_for", return_value=lanes):
            check(replace(contract, cases=partial(iter, some)))
    with patch.object(programs, "lanes_for", return_value=4):
        check_no_numbers(contract)


def check_no_numbers(contract: Contract) -> None:
    """Rows with NaN or infinities name experts all the same, and leave the rows beside them alone."""
    route = next(kernel for kernel in kernels(contract.name) if kernel.provider == "triton").function
    torch.manual_seed(SEED)
    for experts, groups, top_groups in ((60, 1, 1), (9, 3, 1), (64, 4, 1)):
        logits = torch.randn(21, experts)
        nan = torch.tensor(float("nan"))
        logits[3], logits[4], logits[7, ::2], logits[9, 1] = nan, -nan, nan, -nan
        logits[11], logits[12, 0], logits[14, : experts // 2] = -torch.inf, torch.inf, -torch.inf
        top_k = min(8, experts // groups * top_groups)
        rest = (
            (top_k, True)
            if contract.name == "moe_topk_softmax"
            else (None, top_k, groups, top_groups, True, 1.0)
        )
        weights, ids = route(logits, *rest)
        assert bool(((ids >= 0) & (ids < experts)).all()), experts
        is_plain = logits.isfinite().all(-1)
        wanted_weights, wanted_ids = contract.reference(logits, *rest)
        assert int(is_plain.sum()) == 14 and torch.equal(ids[is_plain], wanted_ids[is_plain]), experts
        torch.testing.assert_close(weights[is_plain], wanted_weights[is_plain])


def check_routing_tiles(contract: Contract) -> None:
    """Tiles that the rules would not choose: one part or many, few experts or all, rows beyond the rule."""
    from lockstep.ops.add_norm_route.kernels import triton as chooser
    from lockstep.ops.add_norm_route.tiles import Tile

    cases = [case for case in contract.cases() if case.signature["dtype"] == torch.float16]
    for number, tile in enumerate((Tile(32, 16, 64, 4), Tile(32, 64, 512, 4), Tile(64, 128, 32, 8))):
        some = [case for case in cases if case.signature["inputs"] < 1024][number::5]

        def tile_of(rows: int, inputs: int, tile: Tile = tile) -> Tile | None:
            return tile if 0 < rows <= tile.rows else None

        with patch.object(chooser, "tile_of", tile_of):
            check(replace(contract, cases=partial(iter, some)))


def check_way(contract: Contract, way: str) -> None:
    """Every number of tokens in one way, in tiles that divide neither side."""
    programs = importlib.import_module("lockstep.ops.fused_moe.programs")
    from lockstep.ops.fused_moe.plans import Plan, Problem, rows_for
    from lockstep.ops.grouped_gemm.tiles import Tile

    def plan(problem: Problem, *ignored: object) -> Plan:
        if way.endswith("pairs"):
            stages = 0 if way.startswith("unrolled") else 2
            return Plan("pairs", Tile(1, 8, 64, 4, stages), Tile(1, 16, 32, 4, stages))
        rows = rows_for(problem.num_tokens) if way == "tokens" else 16
        up = Tile(rows, 32, 64, 4, 2)
        return Plan("tokens" if way == "tokens" else "grouped", up, up._replace(outputs=16, inputs=32))

    cases = [case for case in contract.cases() if case.signature["dtype"] != torch.bfloat16]
    number = len(way) % 8
    with patch.object(programs, "plan_of", plan):
        check(replace(contract, cases=lambda: iter(cases[number::13])))


def check_asked(asked: str) -> None:
    name, _, way = asked.partition("/")
    contract = contracts()[name]
    print(asked, end=", ")
    if way:
        check_way(contract, way)
        return
    check(replace(contract, cases=lambda: chosen_cases(contract)))
    if name.startswith("moe_topk"):
        check_lanes(contract)
    if name == "add_norm_route":
        check_routing_tiles(contract)


def main(*named: str) -> None:
    torch.set_num_threads(1)
    for asked in named:
        check_asked(asked)


if __name__ == "__main__":
    main(*sys.argv[1:])
