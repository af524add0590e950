"""Probe points: what a watcher sees, and that nobody pays for the ones that are not watched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lockstep import LLM, SamplingParams
from lockstep.core.probe import ProbePoint

pytestmark = pytest.mark.suite("cpu")

GREEDY = SamplingParams(temperature=0.0, max_tokens=3)


class Watcher:
    """Keeps a copy of every value at the points whose name it is asked to watch."""

    def __init__(self, *endings: str) -> None:
        self._endings = endings
        self.asked: list[ProbePoint] = []
        self.steps: list[tuple[int, tuple[tuple[int, int], ...]]] = []
        self.seen: list[tuple[int, ProbePoint, torch.Tensor]] = []

    def wants(self, point: ProbePoint) -> bool:
        self.asked.append(point)
        return point.name.endswith(self._endings)

    def begin_step(self, step_id: int, rows: tuple[tuple[int, int], ...]) -> None:
        self.steps.append((step_id, rows))

    def record(self, point: ProbePoint, value: Any) -> None:
        self.seen.append((len(self.steps) - 1, point, value.clone()))


@pytest.fixture(scope="module")
def watched() -> tuple[Watcher, tuple[int, ...]]:
    watcher = Watcher("layers.3.mlp.gate_up_proj", "layers.3.mlp.down_proj", "(head)")
    with LLM(probe=watcher, threads=1, dtype="float32", max_total_tokens=512) as llm:
        return watcher, llm.generate("The sea is", GREEDY)[0].token_ids


def test_every_layer_has_points(watched: tuple[Watcher, tuple[int, ...]]) -> None:
    names = {point.name for point in watched[0].asked}
    for layer in range(30):
        for part in ("input_layernorm", "self_attn.qkv_proj", "self_attn", "self_attn.o_proj", "mlp.down_proj"):
            assert f"model.layers.{layer}.{part}" in names
    placements = {point.name: point.placement for point in watched[0].asked}
    assert placements["model.layers.3.mlp.down_proj"] == "partial:tp"
    assert placements["model.layers.3.mlp.gate_up_proj"] == "sharded:tp:1"


def test_rows_are_named_and_values_explain_each_other(watched: tuple[Watcher, tuple[int, ...]]) -> None:
    """The down product, recomputed from what the gate-up product wrote, and the tokens from the head's scores."""
    watcher, token_ids = watched
    steps: dict[int, dict[str, torch.Tensor]] = {}
    for step, point, value in watcher.seen:
        steps.setdefault(step, {})[point.name.rsplit(".", 1)[-1]] = value
    real = [(rows, steps[at]) for at, (step_id, rows) in enumerate(watcher.steps) if step_id >= 0]
    assert [rows[-1][1] - real[0][0][-1][1] for rows, _ in real] == [0, 1, 2]
    chosen = []
    with LLM(threads=1, dtype="float32", max_total_tokens=512) as llm:
        weights = llm._engine.opened.files
    down_DF = _weight(weights, "model.layers.3.mlp.down_proj.weight")
    for rows, values in real:
        gate, up = values["gate_up_proj"].chunk(2, dim=-1)
        assert len(rows) == gate.shape[0]
        expected = (torch.nn.functional.silu(gate) * up) @ down_DF.T
        torch.testing.assert_close(values["down_proj"], expected, rtol=1e-4, atol=1e-4)
        chosen.append(int(values["embed_tokens (head)"][-1].argmax()))
    assert tuple(chosen) == token_ids


def test_unwatched_points_are_absent() -> None:
    with LLM(threads=1, max_total_tokens=512, force_kernel=["decoder_forward=reference"]) as llm:
        model = llm._engine.rank.core.executor._model  # type: ignore[attr-defined]
        assert model._norm._point is None
        assert model._layers[0]._mlp._down._point is None


def _weight(files: Any, name: str) -> torch.Tensor:
    from lockstep.models.loading.weights import FileWeights

    return FileWeights(files).load(name, torch.float32)
