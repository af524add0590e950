"""The embedded model's tokenizer, and one of SentencePiece's kind, as grammars meet them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from lockstep.features.grammar import GrammarCompiler
from lockstep.formats import embedded_model_path, open_model
from lockstep.tokenizer.loading import load_tokenizer
from lockstep.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def embedded() -> Tokenizer:
    return load_tokenizer(open_model(embedded_model_path()))


@pytest.fixture(scope="session")
def compiler(embedded: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(embedded)


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    """Spaces before texts, byte tokens, few pieces, two end tokens."""
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz{}[]:,0123456789", '"']
    pieces = [*letters, ":\u2581", ':\u2581"', '{"', "na", "me", "name", "\u2581t", "\u2581th", "\u2581the"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [
            "<unk>",
            "<s>",
            "</s>",
            *(f"<0x{b:02X}>" for b in range(256)),
            *pieces,
            "<end>",
        ],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces) + 1)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [3],
    }
    end = len(metadata["tokenizer.ggml.tokens"]) - 1
    files = SimpleNamespace(
        kind="gguf", path=Path("x"), metadata=metadata, eos_token_ids=(2, end), bos_token_id=1
    )
    return load_tokenizer(files)  # type: ignore[arg-type]
