"""Token embeddings and the language-model head, split over the vocabulary.

Shapes: T tokens, R rows, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lockstep.layers.build import Build, Slice
from lockstep.layers.linear import TP, Matrix, Piece, load_matrix
from lockstep.ops.decoder_forward.outline import ProductOutline
from lockstep.ops.grouped_weight import GroupedWeight
from lockstep.parallel.mesh import Axis
from lockstep.parallel.placement import Partial, Sharded, expect_whole, gather


class VocabTable:
    """This rank's rows of a vocabulary matrix, padded to ceil(V / ranks) rows of zeros.

    An embedding and a head that are tied share one: with kernels that look rows up in the form that products read,
    it is held once.
    """

    def __init__(self, build: Build, name: str, vocab_size: int, width: int, axis: Axis) -> None:
        group = build.mesh.group(axis)
        self.count = -(-vocab_size // group.size)
        self.start = min(group.rank * self.count, vocab_size)
        length = min(self.count, vocab_size - self.start)
        part = Slice(0, self.start, length)
        self._matrix: Matrix | None
        if length < self.count:
            rows = build.weight(f"{name}.weight", (vocab_size, width), part)
            self._matrix = torch.cat((rows, rows.new_zeros(self.count - length, width)))
        else:
            self._matrix = load_matrix(build, f"{name}.weight", (vocab_size, width), part)
        self._build, self._name, self._dtype = build, name, build.dtype
        self._piece: Piece | None = None

    @classmethod
    def shared(cls, build: Build, name: str, vocab_size: int, width: int, axis: Axis) -> VocabTable:
        """The table of this name, made once for a build."""
        table = build.shared.get((name, axis))
        if table is None:
            table = build.shared[(name, axis)] = cls(build, name, vocab_size, width, axis)
        assert isinstance(table, VocabTable)
        return table

    def as_product(self) -> Piece:
        """The rows as a product's weight, bound at the first call."""
        if self._piece is None:
            assert self._matrix is not None
            self._piece = Piece.bound(self._build, f"{self._name} (head)", self._matrix, None)
            if self._piece.take_rows is not None:
                self._matrix = None
        return self._piece

    @property
    def rows_VD(self) -> torch.Tensor | None:
        """This rank's rows as plain values in the model's dtype; None where they are held in another form."""
        rows = self._matrix
        return rows if isinstance(rows, torch.Tensor) and rows.dtype == self._dtype else None

    @property
    def weight(self) -> Any:
        """The rows as a kernel of a whole decoder takes them."""
        return self._matrix if self._piece is None else self._piece.weight

    def __getitem__(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Rows [T, D] in the model's dtype, by their numbers on this rank."""
        if self._piece is not None and self._piece.take_rows is not None:
            return self._piece.take_rows(self._piece.weight, ids_T).to(self._dtype)
        if isinstance(self._matrix, GroupedWeight):
            self._matrix = self._matrix.dequantise(self._dtype)
        assert self._matrix is not None
        return torch.nn.functional.embedding(ids_T, self._matrix)


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
        self.width = width
        self._axis = axis
        self._num_ranks = build.mesh.size(axis)
        self.table = VocabTable.shared(build, name, vocab_size, width, axis)
        self.scale = None if scale is None else torch.tensor(scale, dtype=build.dtype).item()
        self._point = build.point(name, ("token", "hidden"), f"partial:{axis}")

    @property
    def plain_rows(self) -> torch.Tensor | None:
        """The rows [V, D], where looking them up is all there is to do; None where it is not."""
        is_all = self._num_ranks == 1 and self.scale is None and self._point is None
        return self.table.rows_VD if is_all else None

    def __call__(self, token_ids_T: torch.Tensor) -> Partial:
        if self._num_ranks == 1:
            out_TD = self.table[token_ids_T]
        else:
            local_T = token_ids_T - self.table.start
            mine_T = (local_T >= 0) & (local_T < self.table.count)
            out_TD = self.table[local_T.where(mine_T, local_T.new_zeros(()))] * mine_T.unsqueeze(-1)
        if self.scale is not None:
            out_TD = out_TD * self.scale
        if self._point is not None:
            self._point(out_TD)
        return Partial(out_TD, self._axis, self.where)


class LMHead:
    """Hidden rows to logits over the whole vocabulary, the same on every rank. `soft_cap` as in Gemma 2, in float32.

    Logits without one stay in the dtype that the product rounds to: the best of them can be found as they are.
    """

    def __init__(
        self, build: Build, name: str, vocab_size: int, width: int, *, soft_cap: float = 0.0, axis: Axis = TP
    ) -> None:
        self.where = name
        self.vocab_size = vocab_size
        self._axis = axis
        self._mesh = build.mesh
        self._piece = VocabTable.shared(build, name, vocab_size, width, axis).as_product()
        self.soft_cap = soft_cap
        self._point = build.point(f"{name} (head)", ("row", "vocab"))
        self._chooser = self._bind_chooser(build)

    def _bind_chooser(self, build: Build) -> Callable[..., torch.Tensor] | None:
        """The kernel that finds each row's best score without writing the others, where there is one."""
        if not isinstance(weight := self._piece.weight, torch.Tensor):
            return None
        apart = None
        if build.mesh.size(self._axis) > 1:
            apart = "each rank has a part of the scores"
        elif self.soft_cap:
            apart = "scores are capped before they are compared"
        elif self._point is not None:
            apart = "the scores are watched"
        sizes = {"inputs": weight.shape[1], "outputs": weight.shape[0]}
        bound = build.bind_fused("linear_choose_greedy", f"{self.where} (head)", **sizes, apart=apart)
        return None if bound is None else bound.function

    @property
    def chooses(self) -> bool:
        """Whether `choose_greedy` can be called."""
        return self._chooser is not None

    def choose_greedy(
        self, hidden_RD: torch.Tensor, owners_R: torch.Tensor, last_tokens_S: torch.Tensor
    ) -> torch.Tensor:
        """What the operator choose_greedy finds among the rows' logits, int32 [2, R], without these."""
        assert self._chooser is not None
        return self._chooser(hidden_RD, self._piece.weight, owners_R, last_tokens_S)

    def __call__(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        local = Sharded(self._score(expect_whole(hidden_RD, self.where)), self._axis, -1, self.where)
        logits_RV = gather(local, self._mesh, size=self.vocab_size)
        if self.soft_cap:
            logits_RV = self.soft_cap * torch.tanh(logits_RV.float() / self.soft_cap)
        if self._point is not None:
            self._point(logits_RV)
        return logits_RV

    def _score(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        return self._piece.function(hidden_RD, self._piece.weight, None)

    def outline(self) -> ProductOutline:
        """What it computes before the soft cap, for a kernel of a whole decoder."""
        return ProductOutline((self._piece.weight,))
