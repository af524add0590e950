"""Every architecture built for every rank of every tensor-parallel size, with no devices and no weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch
from tiny_models import LAYOUTS, Layout, TinyModel, build_over

from lockstep.attention.backend import Span
from lockstep.core.errors import ConfigError
from lockstep.layers.build import Place, Slice
from lockstep.models.loading.sources import ShapeWeights
from lockstep.models.registry import model_classes
from lockstep.parallel.mesh import Mesh

pytestmark = pytest.mark.suite("cpu")

SPANS = (Span(0, 5, (0, 1)), Span(6, 1, (2, 3)), Span(4, 3, (4, 5)), Span(9, 1, (6, 7, 8)))
NUM_ROWS = 10

SIZES = [pytest.param(layout, tp, id=f"{layout.name} tp {tp}") for layout in LAYOUTS for tp in layout.valid_tp]


class RecordedShapes(ShapeWeights):
    """Shapes alone, and which part of which weight was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[int, ...], Slice | None]] = []

    def load(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, part: Slice | None) -> torch.Tensor:
        self.asked.append((name, shape, part))
        return super().load(name, shape, dtype, part)

    def fill(self, places: Sequence[Place]) -> None:
        self.asked.extend((place.name, place.shape, place.part) for place in places)
        super().fill(places)


def built(layout: Layout, *, tp: int, rank: int) -> tuple[TinyModel, RecordedShapes]:
    weights = RecordedShapes()
    build = build_over(Mesh.shapes_only({"tp": tp}, rank=rank), weights, meta=True)
    return TinyModel(build, layout.config), weights


def copies_wanted(layout: Layout, name: str, tp: int) -> int:
    """How many ranks hold each entry of a weight."""
    if "norm" in name or name.endswith(".mlp.gate.weight"):
        return tp
    if "k_proj" in name or "v_proj" in name:
        return max(1, tp // layout.num_kv_heads)
    # A row-parallel product's bias is added once, by the first rank.
    return 1


def test_every_architecture_has_a_layout() -> None:
    assert {layout.architecture for layout in LAYOUTS} == set(model_classes())


@pytest.mark.parametrize(("layout", "tp"), SIZES)
def test_shapes_of_a_step(layout: Layout, tp: int) -> None:
    config = layout.config
    num_kv_heads = [0] * config["num_hidden_layers"]
    for rank in range(tp):
        tiny, _ = built(layout, tp=tp, rank=rank)
        hidden_TD, logits_TV = tiny.step(SPANS)
        assert hidden_TD.shape == (NUM_ROWS, config["hidden_size"]) and hidden_TD.is_meta
        assert logits_TV.shape == (NUM_ROWS, config["vocab_size"]) and logits_TV.dtype == torch.float32
        assert tiny.step(SPANS, wanted=(9, 4, 5))[0].shape == (3, config["hidden_size"])
        for layer, shape in enumerate(tiny.build.kv_layers):
            assert shape.head_dim == config["head_dim"]
            num_kv_heads[layer] += shape.num_kv_heads
    assert num_kv_heads == [max(tp, layout.num_kv_heads)] * config["num_hidden_layers"]


@pytest.mark.parametrize(("layout", "tp"), SIZES)
def test_ranks_hold_every_entry_as_often_as_they_should(layout: Layout, tp: int) -> None:
    """Entry by entry along the split dim, so that a gap and an overlap cannot make up for each other."""
    _, whole = built(layout, tp=1, rank=0)
    held: dict[str, torch.Tensor] = {}
    loads: dict[str, int] = defaultdict(int)
    for name, shape, _ in whole.asked:
        loads[name] += 1
        held[name] = torch.zeros(shape, dtype=torch.int32)
    for rank in range(tp):
        for name, shape, part in built(layout, tp=tp, rank=rank)[1].asked:
            assert held[name].shape == shape
            (held[name] if part is None else held[name].narrow(part.dim, part.start, part.length)).add_(1)
    for name, counts in held.items():
        assert (counts == copies_wanted(layout, name, tp) * loads[name]).all(), name
    tied = layout.config.get("tie_word_embeddings", "gemma" in layout.name)
    assert ("lm_head.weight" in held) == (not tied)


@pytest.mark.parametrize(("layout", "tp"), SIZES)
def test_bytes_add_up(layout: Layout, tp: int) -> None:
    """What the ranks hold together is the whole model, its replicated parts once a rank."""
    whole, weights = built(layout, tp=1, rank=0)
    wanted = sum(
        torch.Size(shape).numel() * 4 * copies_wanted(layout, name, tp) for name, shape, _ in weights.asked
    )
    assert whole.build.weight_bytes == sum(torch.Size(shape).numel() * 4 for _, shape, _ in weights.asked)
    assert sum(built(layout, tp=tp, rank=rank)[0].build.weight_bytes for rank in range(tp)) == wanted


@pytest.mark.parametrize(
    ("layout", "tp"),
    [pytest.param(layout, tp, id=f"{layout.name} tp {tp}") for layout in LAYOUTS for tp in layout.invalid_tp],
)
def test_sizes_that_cannot_work_are_refused(layout: Layout, tp: int) -> None:
    """On every rank, by the option's name, before a step runs."""
    for rank in range(tp):
        with pytest.raises(ConfigError, match=rf"heads cannot be shared out over --tp {tp}$"):
            built(layout, tp=tp, rank=rank)


def test_no_more_ranks_than_inner_units() -> None:
    layout = Layout("narrow", "LlamaForCausalLM", (), (), 8, 8, {"intermediate_size": 6})
    with pytest.raises(ConfigError, match="6 cannot be shared out over --tp 8"):
        for rank in range(8):
            built(layout, tp=8, rank=rank)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_layer_asks_for_its_kernels(layout: Layout) -> None:
    """Every bound call site is named, and what one rank binds the others bind too."""
    tp = layout.valid_tp[-1]
    sites = [
        [(each.op, each.where) for each in built(layout, tp=tp, rank=rank)[0].build.kernels.bindings]
        for rank in range(tp)
    ]
    assert all(each == sites[0] for each in sites)
    assert {op for op, _ in sites[0]} >= {"linear", "rms_norm", "add_rms_norm", "rope", "kv_store"}
    assert len(set(sites[0])) == len(sites[0]), "two call sites share a name"
