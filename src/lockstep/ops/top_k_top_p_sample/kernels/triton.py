"""Four Triton programs in place of a sort: nothing is looked at on the host.

Not for rows beyond 524288: their weights, as integers of 44 bits, would not fit a sum of 63.
"""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel, Signature

WIDEST_VOCABULARY = 2**19


def refuses_vocabulary(signature: Signature) -> str | None:
    """The reason why sums of 64 bits cannot hold the weights of so many tokens, if they cannot."""
    vocab_size = signature["vocab_size"]
    if vocab_size <= WIDEST_VOCABULARY:
        return None
    return f"adds up the weights of up to {WIDEST_VOCABULARY} tokens, not {vocab_size}"


def top_k_top_p_sample(
    logits_RV: torch.Tensor,
    temperature_R: torch.Tensor,
    top_k_R: torch.Tensor,
    top_p_R: torch.Tensor,
    min_p_R: torch.Tensor,
    draw_R: torch.Tensor,
) -> torch.Tensor:
    """See the contract. A row with top_k 1 takes no more than a search for its largest logit."""
    from lockstep.ops.top_k_top_p_sample.programs import sample

    return sample(logits_RV, temperature_R, top_k_R, top_p_R, min_p_R, draw_R)


KERNELS = (
    Kernel(
        op="top_k_top_p_sample",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=top_k_top_p_sample,
        platforms=frozenset({"cuda", "rocm", "musa"}),
        features=frozenset({"triton"}),
        refuses=refuses_vocabulary,
    ),
)
