"""Token embeddings and the language-model head, split over the vocabulary.

Shapes: T tokens, R rows, D model, V vocabulary.
"""

from __future__ import annotations

import torch

from lockstep.layers.build import Build, Slice
from lockstep.layers.linear import TP, Product
from lockstep.parallel.mesh import Axis
from lockstep.parallel.placement import Partial, Sharded, expect_whole, gather


def _vocab_rows(
    build: Build, name: str, vocab_size: int, width: int, axis: Axis
) -> tuple[torch.Tensor, int, int]:
    """This rank's rows, padded to ceil(V / ranks) rows of zeros; with the first row's id and the padded count."""
    group = build.mesh.group(axis)
    share = -(-vocab_size // group.size)
    start = min(group.rank * share, vocab_size)
    length = min(share, vocab_size - start)
    rows_VD = build.weight(name, (vocab_size, width), Slice(0, start, length))
    if length < share:
        rows_VD = torch.cat((rows_VD, rows_VD.new_zeros(share - length, width)))
    return rows_VD, start, share


class VocabEmbedding:
    """Token ids to vectors. Every rank looks up the ids it holds; the sum over the axis is the answer.

    `scale` multiplies the vectors, rounded to the model's dtype first, as Gemma does.
    """

    def __init__(
        self,
        build: Build,
        name: str,
        vocab_size: int,
        width: int,
        *,
        scale: float | None = None,
        axis: Axis = TP,
    ) -> None:
        self.where = name
        self._axis = axis
        self._num_ranks = build.mesh.size(axis)
        self._rows_VD, self._start, self._count = _vocab_rows(build, f"{name}.weight", vocab_size, width, axis)
        self._scale = None if scale is None else torch.tensor(scale, dtype=build.dtype).item()
        self._point = build.point(name, ("token", "hidden"), f"partial:{axis}")

    def __call__(self, token_ids_T: torch.Tensor) -> Partial:
        if self._num_ranks == 1:
            out_TD = torch.nn.functional.embedding(token_ids_T, self._rows_VD)
        else:
            local_T = token_ids_T - self._start
            mine_T = (local_T >= 0) & (local_T < self._count)
            found_TD = torch.nn.functional.embedding(
                local_T.where(mine_T, local_T.new_zeros(())), self._rows_VD
            )
            out_TD = found_TD * mine_T.unsqueeze(-1)
        if self._scale is not None:
            out_TD = out_TD * self._scale
        if self._point is not None:
            self._point(out_TD)
        return Partial(out_TD, self._axis, self.where)


class LMHead:
    """Hidden rows to float32 logits over the whole vocabulary, the same on every rank. `soft_cap` as in Gemma 2."""

    def __init__(
        self, build: Build, name: str, vocab_size: int, width: int, *, soft_cap: float = 0.0, axis: Axis = TP
    ) -> None:
        self.where = name
        self.vocab_size = vocab_size
        self._axis = axis
        self._mesh = build.mesh
        rows_VD, _, _ = _vocab_rows(build, f"{name}.weight", vocab_size, width, axis)
        self._product = Product(build, f"{name} (head)", rows_VD, None)
        self._soft_cap = soft_cap
        self._point = build.point(f"{name} (head)", ("row", "vocab"))

    def __call__(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        local = Sharded(self._product(expect_whole(hidden_RD, self.where)), self._axis, -1, self.where)
        logits_RV = gather(local, self._mesh, size=self.vocab_size).float()
        if self._soft_cap:
            logits_RV = self._soft_cap * torch.tanh(logits_RV / self._soft_cap)
        if self._point is not None:
            self._point(logits_RV)
        return logits_RV
