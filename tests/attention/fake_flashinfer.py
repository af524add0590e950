"""As much of FlashInfer's interface as is called, computing what its documentation says, key by key, in float64.

Its wrappers insist on what the real ones do: lists of int32, rows that match the plan, memory that does not move.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


class _Wrapper:
    """What both kinds of wrapper have in common. Pools are [P, K, S, H], the layout that it calls HND."""

    def __init__(self, workspace: torch.Tensor, layout: str) -> None:
        assert layout == "HND" and workspace.dtype == torch.uint8
        self.device = workspace.device
        self.num_plans = 0

    def _keep(self, sizes: tuple[int, ...], options: dict[str, Any]) -> None:
        self.num_plans += 1
        self._sizes = sizes
        self._window_left = options["window_left"]
        self._sm_scale = options["sm_scale"]
        self._dtypes = (options["q_data_type"], options["kv_data_type"])

    def _attend(
        self,
        q: torch.Tensor,
        pools: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor,
        scale: float,
        row: int,
    ) -> None:
        """Row `row` of its sequence's: the lists say which keys it sees."""
        heads, kv_heads, head_dim, page_size = self._sizes
        assert q.shape[1:] == (heads, head_dim) and pools[0].shape[1:] == (kv_heads, page_size, head_dim)
        assert (q.dtype, pools[0].dtype) == self._dtypes and pools[0].stride() == pools[1].stride()
        index, position = self._owner(row)
        first, end = self._starts[index], self._starts[index + 1]
        num_keys = max(end - first - 1, 0) * page_size + self._last[index]
        assert (first == end) == (num_keys == 0)
        begin = 0 if self._window_left < 0 else max(0, position - self._window_left)
        seen = range(begin, min(position + 1, num_keys))
        if not seen:
            out[row] = 0
            return
        where = [(self._pages[first + at // page_size], at % page_size) for at in seen]
        k, v = (torch.stack([pool[page, :, slot] for page, slot in where], 1).double() for pool in pools)
        one = torch.nn.functional.scaled_dot_product_attention(
            q[row].double()[:, None], k, v, scale=self._sm_scale * scale, enable_gqa=True
        )
        out[row] = one[:, 0].to(out.dtype)

    def _owner(self, row: int) -> tuple[int, int]:
        """The row's sequence, and its position there."""
        raise AssertionError


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def __init__(self, workspace: torch.Tensor, layout: str, backend: str) -> None:
        super().__init__(workspace, layout)
        assert backend in ("fa2", "fa3")

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        *sizes: int,
        causal: bool,
        max_token_per_sequence: int,
        **options: Any,
    ) -> None:
        lists = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert causal and all(each.dtype == torch.int32 for each in lists)
        self._rows, self._starts, self._pages, self._last = (each.tolist() for each in lists)
        assert max_token_per_sequence == max(b - a for a, b in zip(self._rows, self._rows[1:], strict=False))
        self._keep(sizes, options)

    def _owner(self, row: int) -> tuple[int, int]:
        index = next(at for at in range(len(self._last)) if self._rows[at + 1] > row)
        num_pages = self._starts[index + 1] - self._starts[index]
        num_keys = max(num_pages - 1, 0) * self._sizes[3] + self._last[index]
        return index, num_keys - self._rows[index + 1] + row

    def run(self, q: torch.Tensor, pools: Any, *, out: torch.Tensor, q_scale: float) -> torch.Tensor:
        assert q.shape[0] == self._rows[-1] and out.shape == q.shape
        for row in range(q.shape[0]):
            self._attend(q, pools, out, q_scale, row)
        return out


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        workspace: torch.Tensor,
        layout: str,
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
    ) -> None:
        super().__init__(workspace, layout)
        self.use_tensor_cores = use_tensor_cores
        self._fixed = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        assert use_cuda_graph == all(each is not None for each in self._fixed)
        self._is_fixed = use_cuda_graph

    def reset_workspace_buffer(self, floats: torch.Tensor, ints: torch.Tensor) -> None:
        assert self.num_plans == 0

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        *sizes: int,
        **options: Any,
    ) -> None:
        lists = (indptr, indices, last_page_len)
        assert all(each.dtype == torch.int32 for each in lists)
        if self._is_fixed:
            for memory, given in zip(self._fixed, lists, strict=True):
                assert memory is not None and len(given) <= len(memory)
                memory[: len(given)] = given
            assert self._fixed[2] is not None and len(last_page_len) == len(self._fixed[2])
            lists = tuple(each for each in self._fixed if each is not None)
        self._lists = lists
        if not self.use_tensor_cores:
            assert sizes[0] // sizes[1] in (1, 2, 3, 4, 8)
        self._keep(sizes, options)

    def _owner(self, row: int) -> tuple[int, int]:
        num_pages = self._starts[row + 1] - self._starts[row]
        return row, max(num_pages - 1, 0) * self._sizes[3] + self._last[row] - 1

    def run(self, q: torch.Tensor, pools: Any, *, out: torch.Tensor, q_scale: float) -> torch.Tensor:
        self._starts, self._pages, self._last = (each.tolist() for each in self._lists)
        assert q.shape[0] == len(self._last) and out.shape == q.shape
        for row in range(q.shape[0]):
            self._attend(q, pools, out, q_scale, row)
        return out


class FakeJit:
    """Names and builds modules: `built` says which, `fails` what the compiler answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.built: list[str] = []
        self.fails = ""
        self.core = SimpleNamespace(get_tmpdir=lambda: folder)
        self.cpp_ext = SimpleNamespace(get_cuda_path=lambda: str(folder / "toolkit"))
        self.env = SimpleNamespace(
            has_flashinfer_jit_cache=lambda: False, FLASHINFER_JIT_DIR=folder, FLASHINFER_AOT_DIR=folder / "aot"
        )

    def get_batch_decode_uri(self, *arguments: Any) -> str:
        return _name("decode", arguments, 9)

    def get_batch_prefill_uri(self, program: str, *arguments: Any) -> str:
        return _name(program, arguments, 10)

    def gen_batch_decode_module(self, *arguments: Any) -> str:
        return self.get_batch_decode_uri(*arguments)

    def gen_batch_prefill_module(self, program: str, *arguments: Any) -> str:
        return self.get_batch_prefill_uri(program, *arguments)

    def build_jit_specs(self, specs: list[str]) -> None:
        if self.fails:
            raise RuntimeError(self.fails)
        for name in specs:
            (self.folder / name).mkdir()
            (self.folder / name / f"{name}.so").touch()
            self.built.append(name)


def _name(program: str, arguments: tuple[Any, ...], count: int) -> str:
    assert len(arguments) == count and math.prod(arguments[4:6]) > 0
    return "_".join(map(str, (program, *arguments)))
