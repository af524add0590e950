"""Products by the native extension, for operators whose weight it packed.

Shapes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch

from lockstep.native import extension, thread_pool

_LANES = 16


def native_product(
    x_TI: torch.Tensor, packed: Any, bias_O: torch.Tensor | None, *, instruction_set: str
) -> torch.Tensor:
    """x @ weight^T + bias in float32, rounded once to the dtype of x. `packed` comes from `ops.native.pack`.

    Runs on as many threads as torch may use. A row's result is the same bits whatever shares the call.
    """
    native = extension()
    assert native is not None
    rows_TI = x_TI.float().contiguous()
    padded = -(-packed.num_outputs // _LANES) * _LANES
    out_TO = torch.empty(rows_TI.shape[0], padded)
    num_threads = torch.get_num_threads()
    native.product(thread_pool(), num_threads, packed, rows_TI.numpy(), instruction_set, out_TO.numpy())
    out_TO = out_TO[:, : packed.num_outputs]
    return (out_TO if bias_O is None else out_TO + bias_O.float()).to(x_TI.dtype).contiguous()
