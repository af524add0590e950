"""The reference against the definition, written out key by key in Python's own numbers."""

from __future__ import annotations

import math

import pytest
import torch

from lockstep.ops.attention_decode.reference import attention_decode
from lockstep.ops.attention_extend.cases import Layer, paged_inputs
from lockstep.ops.attention_extend.reference import attention_extend

pytestmark = pytest.mark.suite("cpu")

LAYERS = (
    Layer(4, 2, 16, 4),
    Layer(6, 2, 16, 4, window=3),
    Layer(3, 1, 16, 1, soft_cap=1.5),
    Layer(2, 2, 16, 4, window=5, soft_cap=2.0, sinks=True),
    Layer(4, 1, 16, 16, sinks=True),
)


def by_hand(layer: Layer, q: list[float], keys: list, values: list, sink: float | None) -> list[float]:
    """One query of one head over the keys that it sees."""
    scores = [layer.scale * sum(a * b for a, b in zip(q, key, strict=True)) for key in keys]
    if layer.soft_cap:
        scores = [layer.soft_cap * math.tanh(score / layer.soft_cap) for score in scores]
    weights = [math.exp(score) for score in scores]
    total = sum(weights) + (math.exp(sink) if sink is not None else 0.0)
    return [sum(w * value[h] for w, value in zip(weights, values, strict=True)) / total for h in range(len(q))]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("lengths", [((3, 9), (1, 1)), ((1, 12), (0, 3), (4, 4))], ids=str)
def test_reference_is_the_definition(layer: Layer, lengths: tuple[tuple[int, int], ...]) -> None:
    rows, num_keys = zip(*lengths, strict=True)
    made = paged_inputs(torch.Generator().manual_seed(3), layer, torch.float32, sum(rows) + 1, num_keys)
    bounds = [sum(rows[:at]) for at in range(len(rows) + 1)]
    cu_rows = torch.tensor(bounds, dtype=torch.int32)
    pools = (made.k_KPSH, made.v_KPSH)
    how = (layer.scale, layer.window, layer.soft_cap)
    out = made.out_TNH
    attention_extend(made.q_TNH, *pools, made.page_table_BP, cu_rows, made.num_keys_B, made.sinks_N, out, *how)
    expected = torch.zeros_like(out)
    for sequence, (num_rows, length) in enumerate(lengths):
        for index in range(num_rows):
            position = length - num_rows + index
            first = max(0, position - layer.window + 1) if layer.window else 0
            for head in range(layer.heads):
                kv_head = head // (layer.heads // layer.kv_heads)
                keys, values = (
                    [
                        pool[
                            kv_head,
                            int(made.page_table_BP[sequence, at // layer.page_size]),
                            at % layer.page_size,
                        ].tolist()
                        for at in range(first, position + 1)
                    ]
                    for pool in pools
                )
                sink = None if made.sinks_N is None else float(made.sinks_N[head])
                row = bounds[sequence] + index
                one = by_hand(layer, made.q_TNH[row, head].tolist(), keys, values, sink)
                expected[row, head] = torch.tensor(one)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6)
    assert not out[-1].any(), "the last row is padding"


def test_decoding_is_extending_by_one_row() -> None:
    layer = Layer(6, 2, 16, 4, window=7, soft_cap=2.0, sinks=True)
    made = paged_inputs(torch.Generator().manual_seed(5), layer, torch.float32, 3, (9, 0, 30))
    pools, how = (made.k_KPSH, made.v_KPSH), (layer.scale, layer.window, layer.soft_cap)
    decoded, extended = made.out_TNH.clone(), made.out_TNH.clone()
    tables = (made.page_table_BP, made.num_keys_B, made.sinks_N)
    attention_decode(made.q_TNH, *pools, *tables, decoded, *how)
    cu_rows = torch.tensor([0, 1, 1, 2], dtype=torch.int32)
    packed_q = made.q_TNH[[0, 2, 1]]
    attention_extend(packed_q, *pools, tables[0], cu_rows, *tables[1:], extended, *how)
    assert torch.equal(decoded[[0, 2, 1]], extended) and not decoded[1].any()
