"""Which way computes a number of tokens: the rules, what was measured before them, and the sweep that measures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.bench.tune_moe import candidates, experts_of, write_table
from lockstep.core.capabilities import Capabilities
from lockstep.core.errors import ConfigError, KernelError, ModelFileError
from lockstep.ops.fused_moe import plans
from lockstep.ops.fused_moe.plans import (
    Measured,
    Plan,
    Problem,
    as_json,
    default_plan,
    measured_file,
    plan_of,
    read_table,
    table_of,
)
from lockstep.ops.grouped_gemm.tiles import DeviceFacts, Tile, step_bytes
from lockstep.ops.registry import kernels
from lockstep.ops.selection import KernelSelector

pytestmark = pytest.mark.suite("cpu")

PROBLEM = Problem(num_tokens=16, num_experts=128, top_k=8, width=2048, inner=768, itemsize=2)
CARD = DeviceFacts("A Fast-Card 80GB", 200_000)


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    plan_of.cache_clear()
    table_of.cache_clear()


def ways(*counts: int, **sizes: int) -> list[str]:
    problem = PROBLEM._replace(**sizes)
    return [default_plan(problem._replace(num_tokens=count), 200_000).way for count in counts]


def test_the_way_follows_how_often_experts_are_shared() -> None:
    assert ways(1, 2, 8, 9, 16, 32, 33, 4096) == ["pairs"] * 3 + ["tokens"] * 3 + ["grouped"] * 2
    # Two of eight experts meet again in the third token.
    assert ways(1, 2, 3, 40, num_experts=8, top_k=2) == ["pairs", "pairs", "tokens", "grouped"]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shared_bytes", [48 * 1024, 227 * 1024])
def test_default_tiles_hold_all_rows_and_fit(itemsize: int, shared_bytes: int) -> None:
    for count in (1, 5, 16, 31, 64, 700, 5000):
        plan = default_plan(PROBLEM._replace(num_tokens=count, itemsize=itemsize), shared_bytes)
        for tile in (plan.up, plan.down):
            if plan.way == "pairs":
                assert tile.rows == 1 and tile.inputs & (tile.inputs - 1) == 0
            else:
                assert tile.num_stages * step_bytes(tile, itemsize) <= shared_bytes
        if plan.way == "tokens":
            assert plan.up.rows >= count
        if plan.way == "grouped":
            assert plan.up.rows == plan.down.rows


def entry(**changes: Any) -> dict[str, Any]:
    plan = Plan("tokens", Tile(16, 32, 128, 4, 3), Tile(16, 64, 64, 4, 3))
    (made,) = as_json([(Measured(PROBLEM, plan), 12.3)])
    return made | changes


def test_measured_plans_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's, then those that ship; for fewer tokens with no more rows than they need, never for others."""
    bundled = tmp_path / "bundled"
    monkeypatch.setattr(plans, "_BUNDLED", bundled)
    shipped = Plan("grouped", Tile(16, 64, 64, 4, 2), Tile(16, 128, 64, 4, 2))
    bundled.mkdir()
    (bundled / "a_fast_card_80gb.json").write_text(
        json.dumps(as_json([(Measured(PROBLEM._replace(num_tokens=64), shipped), 1.0)]))
    )
    cache = tmp_path / "cache"
    assert plan_of(PROBLEM, CARD, cache) == plan_of(PROBLEM, CARD, None) == shipped
    write_table(measured_file(cache, CARD.name), [entry()])
    plan_of.cache_clear()
    table_of.cache_clear()
    own = plan_of(PROBLEM._replace(num_tokens=3), CARD, cache)
    assert own.way == "tokens" and own.up.outputs == 32 and own.down.outputs == 64
    assert plan_of(PROBLEM, CARD, None) == shipped
    assert plan_of(PROBLEM._replace(num_tokens=17), CARD, cache) == shipped
    for other in (PROBLEM._replace(num_tokens=65), PROBLEM._replace(inner=384), PROBLEM._replace(itemsize=4)):
        assert plan_of(other, CARD, cache) == default_plan(other, CARD.shared_bytes)
    elsewhere = DeviceFacts("another", 200_000)
    assert plan_of(PROBLEM, elsewhere, cache) == default_plan(PROBLEM, 200_000)


def test_a_table_is_added_to_and_its_problems_replaced(tmp_path: Path) -> None:
    file = measured_file(tmp_path / "new" / "folder", CARD.name)
    write_table(file, [entry()])
    other = entry(problem=PROBLEM._replace(num_tokens=4)._asdict())
    write_table(file, [entry(microseconds=7.0), other])
    assert [(each["problem"]["num_tokens"], each["microseconds"]) for each in json.loads(file.read_text())] == [
        (16, 7.0),
        (4, 12.3),
    ]
    assert [measured.problem.num_tokens for measured in read_table(file)] == [4, 16]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[1]", "is no table of plans"),
        (json.dumps([entry(plan=entry()["plan"] | {"way": "token"})]), "did you mean 'tokens'"),
    ],
)
def test_a_broken_table_is_named(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "card.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"card.json .*{said}"):
        read_table(file)


def test_a_selector_hands_the_folder_to_the_kernel(tmp_path: Path) -> None:
    """The same function for every call site, so that a compiler may keep one operator for them."""
    here = Capabilities(platform="cuda", device_type="cuda", device_name="card", features=frozenset({"triton"}))
    signature = {"dtype": torch.bfloat16, "experts": 4, "top_k": 2, "width": 64, "inner": 32}
    selector = KernelSelector(here, ("triton",), measured_in=tmp_path)
    first, second = (selector.bind("fused_moe", where, signature).function for where in ("a", "b"))
    assert first is second and first.keywords == {"measured_in": tmp_path}
    plain = KernelSelector(here, ("triton",)).bind("fused_moe", "a", signature)
    assert plain.function is next(k for k in kernels("fused_moe") if k.provider == "triton").function


def test_candidates_can_be_launched() -> None:
    for count in (1, 8, 16, 32, 64, 1024):
        problem = PROBLEM._replace(num_tokens=count)
        seen = 0
        for way, ups, downs in candidates(problem, CARD):
            assert ups and downs
            for tile in (*ups, *downs):
                seen += 1
                assert tile.outputs & (tile.outputs - 1) == 0 and tile.inputs & (tile.inputs - 1) == 0
                if way != "pairs":
                    assert tile.num_stages * step_bytes(tile, 2) <= CARD.shared_bytes
                if way == "tokens":
                    assert tile.rows >= count
        assert 20 <= seen <= 250


def test_the_experts_of_a_rank() -> None:
    config = {
        "hidden_size": 2048,
        "num_hidden_layers": 2,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    }
    assert experts_of(config, tp=2, ep=4, name="m") == Problem(0, 32, 8, 2048, 384, 0)
    with pytest.raises(ConfigError, match="m has no experts to tune for"):
        experts_of({"hidden_size": 2048}, tp=1, ep=1, name="m")
    with pytest.raises(ModelFileError, match="num_experts_per_tok"):
        experts_of({**config, "num_experts_per_tok": 0}, tp=1, ep=1, name="m")


def test_tuning_needs_a_device_of_the_kernel(tmp_path: Path) -> None:
    from lockstep.bench.tune_moe import main
    from lockstep.config import Given

    (tmp_path / "config.json").write_text("{}")
    options = {"model": Given(str(tmp_path), "python"), "device": Given("cpu", "python")}
    with pytest.raises(KernelError, match="there is nothing to tune on cpu"):
        main(options, tokens=(1,), seed=0, json_out=None)


SWEEP = f"""
import sys; sys.path.append({str(Path(__file__).parents[1] / "ops_basic")!r})
import triton_interpreter
import json, torch
import lockstep.bench.ops_timing as timing
import lockstep.bench.tune_moe as tune
from lockstep.ops.fused_moe.plans import Problem
from lockstep.ops.grouped_gemm.tiles import Tile
from lockstep.platforms.registry import load_platform

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)  # fills fresh memory, which may hold the right rows of an earlier call
timing._PASS_S, timing._REPEATS = 0.0, (2, 2)
tune._pair_tiles = lambda inputs: iter([Tile(1, 16, 32, 4, 1)])
tune._block_tiles = lambda rows, *rest: iter([Tile(1, 16, 16, 4, 2), Tile(rows, 16, 16, 4, 2)])
sweep = tune.Sweep(load_platform("cpu"), torch.float32)
sweep.run(Problem(2, 3, 2, 32, 16, 4))
print(json.dumps({{"table": sweep.table(), "tried": sweep.tried, "wrong": sweep.wrong}}))
"""


def test_a_sweep_checks_before_it_times() -> None:
    """In Triton's interpreter. A tile with fewer rows than tokens leaves some out: it is found, and not timed."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SWEEP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tried"] and all(each["microseconds"] > 0 for each in found["tried"])
    best = min(each["microseconds"] for each in found["tried"])
    assert [each["microseconds"] for each in found["table"]] == [best]
    assert found["wrong"] and all("rows=1, outputs=16" in text and "off by" in text for text in found["wrong"])
