"""Shapes: B sequences, A those of them with keys, D model, R2 half of a head, L blocks, K KV heads, H head dim,
P pages, S page size.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lockstep.ops.decoder_forward.outline import DecoderOutline
from lockstep.ops.decoder_forward.reference import Pools, decoder_forward
from lockstep.ops.norm_rope_attention_decode.reference import new_slots


def decoder_decode(
    embedded_BD: torch.Tensor,
    cos_BR2: torch.Tensor,
    sin_BR2: torch.Tensor,
    page_table_BP: torch.Tensor,
    num_keys_B: torch.Tensor,
    outline: DecoderOutline,
    kv_L2KPSH: Pools,
) -> torch.Tensor:
    """Hidden rows [B, D] after the last norm, in the dtype of `embedded`, of each sequence's one new token; its keys
    and values are stored in the pools.

    The new token is the last of the num_keys[b] keys of its sequence and is stored there; what the pools held in that
    slot is never read. A row without keys is padding: nothing is stored, zeros come out. No row's pages hold the slot
    that another row writes, and all other keys and values were written before the step that this call belongs to
    began: kernels may read them while the operator before this one still runs. Every block rotates by the angles given
    (its `rope` is 0); the outline's embedding, ropes and head are not used.
    """
    slots_B = new_slots(page_table_BP, num_keys_B, kv_L2KPSH[0][0].shape[2])
    given = (embedded_BD, cos_BR2, sin_BR2, page_table_BP, num_keys_B)
    return decode_at(slots_B, *given, outline, kv_L2KPSH)


def decode_at(
    slots_B: torch.Tensor,
    embedded_BD: torch.Tensor,
    cos_BR2: torch.Tensor,
    sin_BR2: torch.Tensor,
    page_table_BP: torch.Tensor,
    num_keys_B: torch.Tensor,
    outline: DecoderOutline,
    kv_L2KPSH: Pools,
) -> torch.Tensor:
    """See decoder_decode; a new token's key and value go to slot slots[b], wherever its sequence's last key is."""
    rows_A = num_keys_B.nonzero().flatten()
    numbers_A1 = torch.arange(len(rows_A) + 1, device=rows_A.device)
    # Rows in the place of an embedding, each the position of its own angles.
    of_rows = replace(
        outline,
        embedding=embedded_BD[rows_A],
        embedding_scale=1.0,
        ropes=((cos_BR2[rows_A], sin_BR2[rows_A]),),
    )
    hidden_AD = decoder_forward(
        numbers_A1[:-1],
        numbers_A1[:-1],
        slots_B[rows_A],
        page_table_BP[rows_A],
        numbers_A1.int(),
        num_keys_B[rows_A],
        of_rows,
        kv_L2KPSH,
    )
    out_BD = embedded_BD.new_zeros(embedded_BD.shape)
    out_BD[rows_A] = hidden_AD.to(out_BD.dtype)
    return out_BD
