"""As much of cuDNN's Python interface as is called: a graph that reads memory by the sizes and strides it was told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


class FakeTensor:
    """A tensor's description; setters give it back, as the library's do."""

    def __init__(self, **told: Any) -> None:
        self.told = told

    def _set(self, name: str, value: Any) -> FakeTensor:
        self.told[name] = value
        return self

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("set_"):
            raise AttributeError(name)
        return lambda value: self._set(name.removeprefix("set_"), value)

    def read(self, values: dict[int, torch.Tensor]) -> torch.Tensor:
        """What lies in memory, by size and stride alone."""
        given = values[self.told["uid"]]
        return given.as_strided(self.told["dim"], self.told["stride"])


class FakeGraph:
    """Attention of single rows over pages in the ragged layout, with a bottom-right mask; other uses are refused."""

    num_built = 0

    def __init__(self, **types: Any) -> None:
        assert {"io_data_type", "intermediate_data_type", "compute_data_type", "handle"} == set(types)

    def tensor(self, **told: Any) -> FakeTensor:
        return FakeTensor(**told)

    def sdpa(self, **told: Any) -> tuple[FakeTensor, None]:
        assert told["use_padding_mask"] and told["generate_stats"] is False
        assert told["diagonal_alignment"] == "bottom right" and told["diagonal_band_right_bound"] == 0
        self._told, self._out = told, FakeTensor()
        return self._out, None

    def build(self, modes: list[str]) -> None:
        table, pool = (self._told[name].told["dim"] for name in ("paged_attention_k_table", "k"))
        assert self._told["paged_attention_max_seq_len_kv"] == table[2] * pool[2]
        assert table[0] == self._told["q"].told["dim"][0]
        FakeGraph.num_built += 1

    def get_workspace_size(self) -> int:
        return 16

    def execute(self, values: dict[int, torch.Tensor], workspace: torch.Tensor, handle: Any) -> None:
        assert handle == "handle" and workspace.numel() >= 16
        told = self._told
        rows, keys = (told[name].read(values).flatten().tolist() for name in ("seq_len_q", "seq_len_kv"))
        tables = [told[f"paged_attention_{name}_table"].read(values)[:, 0, :, 0] for name in ("k", "v")]
        pools = [told[name].read(values) for name in ("k", "v")]
        places = [each.told["ragged_offset"].read(values).flatten().tolist() for each in (told["q"], self._out)]
        for index, (num_rows, num_keys) in enumerate(zip(rows, keys, strict=True)):
            assert 0 <= num_rows <= told["q"].told["dim"][2] == 1 and num_keys > 0
            seen = [
                pool[table[index].long()].transpose(0, 1).flatten(1, 2)[:, :num_keys]
                for pool, table in zip(pools, tables, strict=True)
            ]
            q, out = (
                self._rows(each, values, place[index], num_rows)
                for each, place in zip((told["q"], self._out), places, strict=True)
            )
            position = torch.arange(num_keys - num_rows, num_keys)[:, None]
            key = torch.arange(num_keys)
            mask = key <= position
            if told["diagonal_band_left_bound"] is not None:
                mask &= key > position - told["diagonal_band_left_bound"]
            wide = (each.double() for each in (q, *seen))
            found = torch.nn.functional.scaled_dot_product_attention(
                *wide, attn_mask=mask, scale=told["attn_scale"], enable_gqa=True
            )
            out.copy_(found)

    def _rows(
        self, tensor: FakeTensor, values: dict[int, torch.Tensor], first: int, num_rows: int
    ) -> torch.Tensor:
        """[N, rows, H] of one sequence, from its first element on."""
        given = values[tensor.told["uid"]]
        _, heads, _, head_dim = tensor.told["dim"]
        _, by_head, by_row, by_element = tensor.told["stride"]
        size, stride = (heads, num_rows, head_dim), (by_head, by_row, by_element)
        return given.as_strided(size, stride, given.storage_offset() + first)


def fake_library() -> SimpleNamespace:
    """The package's names that are used."""
    types = SimpleNamespace(BFLOAT16="bf16", HALF="fp16", FLOAT="fp32", INT32="i32")
    return SimpleNamespace(
        data_type=types,
        pygraph=FakeGraph,
        diagonal_alignment=SimpleNamespace(BOTTOM_RIGHT="bottom right"),
        heur_mode=SimpleNamespace(A="a", FALLBACK="fallback"),
        set_stream=lambda handle, stream: None,
    )
