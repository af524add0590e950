"""A model split over ranks that really communicate gives one rank's logits."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from tiny_models import LAYOUTS, Layout, SeededWeights, TinyModel, build_over

from lockstep.core.errors import ConfigError, EngineDead, PlacementError
from lockstep.parallel import processes
from lockstep.parallel.mesh import Axis, Mesh
from lockstep.parallel.placement import Partial, Sharded, gather, reduce
from lockstep.parallel.processes import connect

pytestmark = pytest.mark.suite("cpu")

TOLERANCE = 1e-5
"""Logits are of order one; sums in another order move them by about 1e-6."""

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick_and_single_threaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One rank's failure must not keep the others waiting for minutes."""
    monkeypatch.setattr(processes, "CONNECT_TIMEOUT_S", 30)
    monkeypatch.setattr(processes, "COLLECTIVE_TIMEOUT_S", 30)
    torch.set_num_threads(1)
    yield


def on_ranks(
    size: int, store: Path, work: Callable[[Mesh], torch.Tensor], look: Callable[[], None] = lambda: None
) -> list[torch.Tensor]:
    """What `work` gives on each rank of one axis."""
    return on_mesh({"tp": size}, store, work, look)


def on_mesh(
    sizes: dict[str, int],
    store: Path,
    work: Callable[[Mesh], torch.Tensor],
    look: Callable[[], None] = lambda: None,
) -> list[torch.Tensor]:
    """What `work` gives on each rank: threads of this process, joined by real Gloo groups."""
    found: dict[int, torch.Tensor] = {}
    failures: list[BaseException] = []

    def rank_main(rank: int) -> None:
        try:
            with torch.inference_mode():
                mesh = connect(sizes, rank=rank, store=store, backend="gloo", device=CPU, check_peers=look)
                found[rank] = work(mesh)
        except BaseException as error:
            failures.append(error)

    ranks = range(math.prod(sizes.values()))
    threads = [threading.Thread(target=rank_main, args=(rank,), name=f"rank {rank}") for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [found[rank] for rank in ranks]


def one_rank_logits(layout: Layout, noisy: str = "") -> torch.Tensor:
    return TinyModel(build_over(Mesh.solo(), SeededWeights(noisy)), layout.config).logits()


@pytest.mark.parametrize(
    ("layout", "tp"),
    [pytest.param(layout, tp, id=f"{layout.name} tp {tp}") for layout in LAYOUTS for tp in layout.valid_tp[1:]],
)
def test_split_models_agree_with_one_rank(layout: Layout, tp: int, tmp_path: Path) -> None:
    """Uneven shares of KV heads and inner units, KV heads held by several ranks, padded vocabularies, every bias."""
    expected = one_rank_logits(layout)
    ranks = on_ranks(
        tp,
        tmp_path / "store",
        lambda mesh: TinyModel(build_over(mesh, SeededWeights()), layout.config).logits(),
    )
    assert expected.shape[1] == layout.config["vocab_size"] and expected.std() > 0.3
    for logits in ranks:
        assert torch.equal(logits, ranks[0]), "ranks disagree in the last bit"
        difference = float((logits - expected).abs().max())
        assert difference < TOLERANCE, difference


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_weight_moves_the_logits(layout: Layout) -> None:
    """A few percent of noise in any weight show far above the tolerance: no entry in a wrong place could hide."""
    expected = one_rank_logits(layout)
    weights = SeededWeights()
    TinyModel(build_over(Mesh.solo(), weights), layout.config)
    for name in dict.fromkeys(weights.names):
        moved = float((one_rank_logits(layout, name) - expected).abs().max())
        assert moved > 100 * TOLERANCE, (name, moved)


def test_a_bias_on_every_rank_would_show(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The mutant that placements cannot see: each rank adds the whole bias to its term."""
    from lockstep.layers import linear

    layout = next(each for each in LAYOUTS if each.name == "llama with biases, tied")
    original = linear.RowParallelLinear.__init__

    def init(self: linear.RowParallelLinear, build: object, *arguments: object, **options: object) -> None:
        original(self, build, *arguments, **options)  # type: ignore[arg-type]
        if self.product.bias_O is None:
            part = arguments[1]
            name, width = f"{part.name}.bias", arguments[2]  # type: ignore[attr-defined]
            bias = SeededWeights().load(name, (width,), torch.float32, None)  # type: ignore[arg-type]
            self.product.pieces = [replace(piece, bias_O=bias) for piece in self.product.pieces]

    monkeypatch.setattr(linear.RowParallelLinear, "__init__", init)
    ranks = on_ranks(
        2, tmp_path / "store", lambda mesh: TinyModel(build_over(mesh, SeededWeights()), layout.config).logits()
    )
    assert float((ranks[0] - one_rank_logits(layout)).abs().max()) > 1000 * TOLERANCE


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_collectives(size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """A sum and a gather of each rank's own numbers, along the first and the last dim."""

    def term(rank: int) -> torch.Tensor:
        return (torch.arange(12).view(3, 4) + 100 * rank).to(dtype)

    def work(mesh: Mesh) -> torch.Tensor:
        rank = mesh.rank("tp")
        assert mesh.size("tp") == size and mesh.size("ep") == 1
        total = reduce(Partial(term(rank), "tp"), mesh)
        rows = gather(Sharded(term(rank), "tp", 0), mesh)
        columns = gather(Sharded(term(rank).T, "tp", -1), mesh)
        return torch.cat((total.flatten(), rows.flatten(), columns.flatten()))

    terms = [term(rank) for rank in range(size)]
    total = torch.stack(terms).float().sum(0).to(dtype)
    expected = torch.cat(
        (total.flatten(), torch.cat(terms).flatten(), torch.cat([each.T for each in terms], -1).flatten())
    )
    for found in on_ranks(size, tmp_path / "store", work):
        assert torch.equal(found, expected)


def test_sums_along_every_axis_and_over_all(tmp_path: Path) -> None:
    """Rank r holds 10^r, so that a sum shows whose terms it has."""

    def work(mesh: Mesh) -> torch.Tensor:
        term = torch.tensor([10.0**mesh.everyone.rank])
        axes: list[Axis] = ["dp", "ep", "tp", ("ep", "tp")]
        return torch.cat([reduce(Partial(term.clone(), axis), mesh) for axis in axes])

    found = on_mesh({"ep": 2, "tp": 2}, tmp_path / "store", work)
    assert [each.tolist() for each in found] == [
        [1.0, 101.0, 11.0, 1111.0],
        [10.0, 1010.0, 11.0, 1111.0],
        [100.0, 101.0, 1100.0, 1111.0],
        [1000.0, 1010.0, 1100.0, 1111.0],
    ]


def test_two_meshes_live_in_one_process(tmp_path: Path) -> None:
    def work(mesh: Mesh) -> torch.Tensor:
        rank = mesh.rank("tp")
        other = connect({"ep": 2}, rank=rank, store=tmp_path / "other", backend="gloo", device=CPU)
        value = torch.full((2,), float(rank + 1))
        return torch.cat((reduce(Partial(value.clone(), "tp"), mesh), reduce(Partial(value * 10, "ep"), other)))

    for found in on_ranks(2, tmp_path / "store", work):
        assert found.tolist() == [3.0, 3.0, 30.0, 30.0]
    assert not torch.distributed.is_initialized()


def test_a_peer_that_is_gone_ends_a_wait_that_gloo_would_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 never comes, and its connection stays open: nothing but the look at the peers can tell."""
    monkeypatch.setattr(processes, "LOOK_EVERY", timedelta(milliseconds=50))
    looks = itertools.count(1)

    def look() -> None:
        if next(looks) == 3:
            raise EngineDead("rank 1 is gone")

    def work(mesh: Mesh) -> torch.Tensor:
        if mesh.rank("tp") == 1:
            (other,) = [thread for thread in threading.enumerate() if thread.name == "rank 0"]
            other.join(10)
            assert not other.is_alive(), "the end of its group waits for us"
            return torch.zeros(1)
        with pytest.raises(EngineDead, match="rank 1 is gone"):
            reduce(Partial(torch.ones(3), "tp"), mesh)
        return torch.ones(1)

    assert [each.item() for each in on_ranks(2, tmp_path / "store", work, look)] == [1.0, 0.0]
    assert next(looks) == 4


def test_a_slow_peer_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LOOK_EVERY", timedelta(milliseconds=20))

    def work(mesh: Mesh) -> torch.Tensor:
        if mesh.rank("tp") == 1:
            time.sleep(0.3)
        return reduce(Partial(torch.ones(3), "tp"), mesh)

    assert [each.tolist() for each in on_ranks(2, tmp_path / "store", work)] == [[2.0] * 3] * 2


def test_one_rank_needs_nobody(tmp_path: Path) -> None:
    mesh = connect({"tp": 1}, rank=0, store=tmp_path / "never", backend="gloo", device=CPU)
    assert mesh.size("tp") == 1 and not (tmp_path / "never").exists()


def test_unknown_backend(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown collective backend 'glo'"):
        connect({"tp": 2}, rank=0, store=tmp_path / "store", backend="glo", device=CPU)


def test_a_wrong_split_fails_before_anyone_waits(tmp_path: Path) -> None:
    """A placement error on a real mesh is raised where it happens, not as a timeout."""

    def work(mesh: Mesh) -> torch.Tensor:
        value = Partial(torch.ones(2), "tp", "layer.o_proj")
        reduce(value, mesh)
        return reduce(value, mesh)

    with pytest.raises(PlacementError, match=r"layer\.o_proj was already reduced"):
        on_ranks(2, tmp_path / "store", work)
