"""What an opened model looks like, whatever container it came in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

from lockstep.core.errors import ModelFileError
from lockstep.core.request import Pooling


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies and how its bytes are to be read.

    `name` is canonical (Hugging Face's), `stored_name` is the file's own. `shape` is in torch order, outermost
    dim first. `offset` counts bytes from the start of `file`. Two habits of GGUF converters are recorded here
    so that readers need not know the architecture: `interleaved_head_dim` > 0 says that, within each group
    of so many rows, the two halves of a rotary head are stored interleaved (0, d/2, 1, d/2 + 1, ...);
    `stored_offset` was added to every value before it was stored.
    """

    name: str
    storage_type: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    stored_name: str
    interleaved_head_dim: int = 0
    stored_offset: float = 0.0

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """An opened model: everything but the values of its tensors.

    `config` has the keys of Hugging Face's config.json, its rotary settings in one spelling: `rope_theta`,
    `rope_scaling` (always there: None or a dict with `rope_type`) and, for Gemma 3, `rope_local_base_freq`.
    `tie_word_embeddings` is always there too. `pooling` is "mean" or "last" where the model declares it for
    embeddings, None where it declares nothing or another kind. `tensors` maps canonical names, in file order.
    `metadata` is GGUF's key-value table, empty otherwise.
    """

    path: Path
    kind: Literal["gguf", "huggingface"]
    name: str
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pooling: Pooling | None
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors in the files; tied embeddings count once."""
        return sum(info.num_elements for info in self.tensors.values())

    @property
    def main_storage_type(self) -> str:
        """The storage type that holds most elements, e.g. "BF16" or "Q4_K"."""
        elements: Counter[str] = Counter()
        for info in self.tensors.values():
            elements[info.storage_type] += info.num_elements
        return elements.most_common(1)[0][0]


def index_tensors(path: Path, infos: Iterable[TensorInfo]) -> dict[str, TensorInfo]:
    """Tensors by canonical name. Raises ModelFileError when two claim one name, or none is there."""
    tensors: dict[str, TensorInfo] = {}
    for info in infos:
        twin = tensors.setdefault(info.name, info)
        if twin is not info:
            where = info.file if info.file == twin.file else f"{twin.file} and {info.file}"
            raise ModelFileError(f"{where}: tensor {info.stored_name!r} is stored twice; the model is corrupt")
    if not tensors:
        raise ModelFileError(f"{path}: no tensor is stored here; the model is incomplete, fetch it again")
    return tensors
