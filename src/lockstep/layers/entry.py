"""Where rows enter a model.

Shapes: T tokens, D model, P positions, R2 rotated pairs.
"""

from __future__ import annotations

import torch

from lockstep.layers.build import Build, ForwardContext
from lockstep.layers.embedding import VocabEmbedding
from lockstep.layers.heads import CosSin
from lockstep.layers.rope import RotaryEmbedding
from lockstep.layers.tokens import Tokens
from lockstep.parallel.placement import reduce


class Entry:
    """Embeddings [T, D] of a step's rows, whole on every rank, and the angles of their positions.

    By one kernel where there is one, this rank holds the whole table as plain values, and nothing is to be done with
    the rows. Made after everything else that uses the table.
    """

    def __init__(self, build: Build, embedding: VocabEmbedding, rotary: RotaryEmbedding) -> None:
        self._embedding, self._rotary, self._mesh = embedding, rotary, build.mesh
        rows_VD = embedding.plain_rows
        fused = build.bind_fused(
            "begin_rows",
            embedding.where,
            apart="rows of the table are in parts, scaled or watched" if rows_VD is None else None,
            width=embedding.width,
            pairs=rotary.table.shape[2],
        )
        self._function = None if fused is None else fused.function
        self._rows_VD = rows_VD

    def __call__(self, ctx: ForwardContext, tokens: Tokens) -> tuple[torch.Tensor, CosSin]:
        if self._function is None:
            return reduce(self._embedding(tokens.ids()), self._mesh), self._rotary.at(ctx.positions_T)
        given = (tokens.known_T, tokens.sources_T, tokens.last_S, ctx.positions_T)
        hidden_TD, angles_2TR = self._function(*given, self._rows_VD, self._rotary.table)
        cos, sin = angles_2TR.unbind()
        return hidden_TD, (cos, sin)
