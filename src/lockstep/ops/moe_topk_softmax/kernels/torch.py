"""One selection over keys that hold logit and id, then torch's softmax.

Shapes: T tokens, E experts, K experts of each token.
"""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel


def moe_topk_softmax(
    logits_TE: torch.Tensor, top_k: int, renormalise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract."""
    wide_TE = logits_TE.float()
    ids_TK = first_of_largest(wide_TE, top_k)
    # Over the chosen logits alone, softmax is the renormalised one.
    if renormalise:
        weights_TK = torch.softmax(wide_TE.gather(-1, ids_TK), dim=-1)
    else:
        weights_TK = torch.softmax(wide_TE, dim=-1).gather(-1, ids_TK)
    return weights_TK, ids_TK.to(torch.int32)


def first_of_largest(values_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """Ids of the `top_k` largest float32 values of each row, largest first, of equal ones the lowest id first.

    torch.topk leaves ties open. The bits of a float order like an integer once those of negative ones are turned,
    so that one integer of value and id decides everything.
    """
    num_experts = values_TE.shape[-1]
    bits_TE = (values_TE + 0.0).view(torch.int32)  # Adding zero makes minus zero plus zero.
    ordered_TE = torch.where(bits_TE < 0, bits_TE ^ 0x7FFFFFFF, bits_TE).to(torch.int64)
    last_first_E = torch.arange(num_experts - 1, -1, -1, device=values_TE.device)
    keys_TE = ordered_TE * num_experts + last_first_E
    return num_experts - 1 - torch.topk(keys_TE, top_k, dim=-1).values.remainder(num_experts)


KERNELS = (
    Kernel(
        op="moe_topk_softmax", provider="torch", function=moe_topk_softmax, verified_on=("cpu", "NVIDIA H100")
    ),
)
