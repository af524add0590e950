"""The tokenizer that a model's files describe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockstep.tokenizer.from_gguf import gguf_tokenizer
from lockstep.tokenizer.from_huggingface import huggingface_tokenizer
from lockstep.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lockstep.formats import ModelFiles


def load_tokenizer(files: ModelFiles) -> Tokenizer:
    """The tokenizer in GGUF metadata, or in the tokenizer.json of a Hugging Face directory.

    Raises ModelFileError when there is none, when it is broken or of a kind that Lockstep does not know.
    """
    if files.kind == "gguf":
        return gguf_tokenizer(files)
    return huggingface_tokenizer(files)
