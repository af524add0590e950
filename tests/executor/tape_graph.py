"""A device graph on the host: a tape of torch operators over fixed memory, and kernels that a tape can hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lockstep.attention.paged_backend import PagedBackend
from lockstep.attention.table_parts import DecodeTables, ExtendTables
from lockstep.ops.contract import Kernel, Signature
from lockstep.ops.registry import kernels
from lockstep.ops.rms_norm.reference import rms_norm
from lockstep.ops.rope.reference import rope
from lockstep.ops.selection import Binding, KernelSelector


class TapeGraph:
    """Records operators with the very tensors that they read and wrote; a replay computes them again, in place.

    Like a device's graph it knows nothing of Python: a number that the host computed while recording stays what it was.
    """

    def __init__(self, beside: TapeGraph | None = None) -> None:
        self.beside = beside
        self.num_replays = 0
        self._tape: list[tuple[Any, Any, Any, Any]] = []

    @contextmanager
    def capture(self) -> Iterator[None]:
        with _Recording(self._tape):
            yield

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def replay(self) -> None:
        self.num_replays += 1
        for function, args, kwargs, results in self._tape:
            fresh = function(*args, **kwargs)
            for kept, value in zip(tree_leaves(results), tree_leaves(fresh), strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != value.data_ptr():
                    kept.copy_(value)


_TAKES_MEMORY = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default}


class _Recording(TorchDispatchMode):
    def __init__(self, tape: list[tuple[Any, Any, Any, Any]]) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        results = func(*args, **(kwargs or {}))
        if func in _TAKES_MEMORY:
            # A device's graph has its memory before it runs, and what others wrote there stays.
            return results
        self._tape.append((func, args, kwargs or {}, results))
        return results


def store(k_TNH: Any, v_TNH: Any, k_NPSH: Any, v_NPSH: Any, slots_T: Any) -> None:
    """kv_store without asking the host which rows are padding."""
    for rows_TNH, pool_NPSH in ((k_TNH, k_NPSH), (v_TNH, v_NPSH)):
        flat_NSH = pool_NPSH.flatten(1, 2)
        is_slot_TS = slots_T[:, None] == torch.arange(flat_NSH.shape[1])
        new_NSH = torch.einsum("ts,tnh->nsh", is_slot_TS.to(rows_TNH.dtype), rows_TNH).to(flat_NSH.dtype)
        flat_NSH.copy_(torch.where(is_slot_TS.any(0)[None, :, None], new_NSH, flat_NSH))


def decode(
    q_BNH: Any, k_KPSH: Any, v_KPSH: Any, table_BP: Any, num_keys_B: Any, sinks_N: Any, out_BNH: Any, *how: Any
) -> None:
    """attention_decode over every page of the table, masked: lengths are read where they lie."""
    scale, window, soft_cap = how
    assert sinks_N is None and not window and not soft_cap
    k_KBLH, v_KBLH = (pool[:, table_BP.long()].flatten(2, 3) for pool in (k_KPSH, v_KPSH))
    q_KBGH = q_BNH.unflatten(1, (k_KPSH.shape[0], -1)).transpose(0, 1)
    scores_KBGL = q_KBGH @ k_KBLH.transpose(2, 3) * scale
    is_key_BL = torch.arange(k_KBLH.shape[2]) < num_keys_B[:, None]
    weights_KBGL = scores_KBGL.masked_fill(~is_key_BL[None, :, None], float("-inf")).softmax(-1)
    out_BNH.copy_((weights_KBGL.nan_to_num(0.0) @ v_KBLH).transpose(0, 1).flatten(1, 2))


def decode_shared(*given: Any) -> None:
    """attention_decode_shared: the shared pages of a tile's sequences are looked up in the table of one of them."""
    q_BNH, k_KPSH, v_KPSH, table_BP, num_keys_B, shared_keys_B, tiles_TR, sinks_N, out_BNH, scale, soft_cap = (
        given
    )
    is_in_BT = (tiles_TR[None] == torch.arange(len(table_BP))[:, None, None]).any(2)
    lead_B = torch.where(is_in_BT, tiles_TR.amax(1)[None], 0).amax(1).long()
    is_shared_BP = torch.arange(table_BP.shape[1]) * k_KPSH.shape[2] < shared_keys_B[:, None]
    table_BP = torch.where(is_shared_BP, table_BP.index_select(0, lead_B), table_BP)
    decode(q_BNH, k_KPSH, v_KPSH, table_BP, num_keys_B, sinks_N, out_BNH, scale, 0, soft_cap)


def fresh_decode(*given: Any) -> None:
    """norm_rope_attention_decode: new slots are looked up in the tables, where they lie."""
    heads_BAH, q_weight_H, k_weight_H, eps, cos_BR2, sin_BR2, *rest = given
    k_KPSH, v_KPSH, table_BP, num_keys_B, *_ = rest
    num_kv, page_size = k_KPSH.shape[0], k_KPSH.shape[2]
    last_B = num_keys_B.clamp(min=1).long() - 1
    page_B = table_BP.gather(1, (last_B // page_size)[:, None])[:, 0]
    slots_B = torch.where(num_keys_B > 0, page_B * page_size + last_B % page_size, -1)
    q_BNH, k_BKH, v_BKH = heads_BAH.split([heads_BAH.shape[1] - 2 * num_kv, num_kv, num_kv], dim=1)
    if q_weight_H is not None:
        q_BNH, k_BKH = rms_norm(q_BNH, q_weight_H, eps), rms_norm(k_BKH, k_weight_H, eps)
    q_BNH, k_BKH = (rope(each, cos_BR2, sin_BR2, k_KPSH.dtype) for each in (q_BNH, k_BKH))
    store(k_BKH, v_BKH, k_KPSH, v_KPSH, slots_B)
    decode(q_BNH, *rest)


class TapeSelector(KernelSelector):
    """Binds as ever, with a store that a tape can hold; `calls` names the bound kernels in the order of their calls."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.calls: list[tuple[str, str]] = []

    def bind(self, op: str, where: str, signature: Signature) -> Binding:
        binding = super().bind(op, where, signature)
        kernel = binding.kernel
        function = store if op == "kv_store" else kernel.function

        def called(*arguments: Any) -> Any:
            self.calls.append((op, where))
            return function(*arguments)

        return replace(binding, kernel=replace(kernel, function=called, asks_host=False))


def tape_attention(*, shares: bool = False, fresh: Callable[..., None] | None = None) -> PagedBackend:
    """Attention that a tape can hold: `shares`, with a kernel for shared keys; `fresh`, one of fresh heads."""
    extend = next(kernel for kernel in kernels("attention_extend") if kernel.provider == "reference")
    tape = Kernel(op="attention_decode", provider="tape", function=decode)
    shared = Kernel(op="attention_decode_shared", provider="tape", function=decode_shared) if shares else None
    at_once = (
        None if fresh is None else Kernel(op="norm_rope_attention_decode", provider="tape", function=fresh)
    )
    return PagedBackend(DecodeTables(tape, shared, at_once), ExtendTables(extend))
