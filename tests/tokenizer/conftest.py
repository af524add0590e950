"""The embedded model's tokenizer, texts that tokenizers get wrong, and a stand-in for a model's files."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lockstep.formats import ModelFiles, embedded_model_path, open_model
from lockstep.tokenizer.loading import load_tokenizer
from lockstep.tokenizer.tokenizer import Tokenizer

TEXTS = (
    "",
    " ",
    "Hello, world!",
    "  leading and trailing  ",
    "\n\n\n\ttabs\t\tand \r\n line ends\n",
    "It's what we'll've said, THEY'RE I'd 'tis",
    "1234567890 3.14159 1,000,000 ½ Ⅷ ٣٤ x²",
    "def f(x: int) -> str:\n    return f'{x:>10}'  # comment\n\n\nclass A: pass\n",
    '<p class="a">&amp; a != b && c || d; $x += 1; `code` ~/path/*.py',
    "你好，世界。こんにちは 안녕하세요 สวัสดี नमस्ते שלום عليكم Привет Γειά",  # noqa: RUF001
    "café cafe\u0301 naïve Å Å ﬁ ß İi",
    "👩‍👩‍👧‍👦 🇫🇷 👍🏽 🤖 emoji🙂mixed",
    "a\u00a0b\u2003c\u200bd\ufeffe\u3000f",
    "\x00\x01\x7f control",
    "a" * 300 + " " * 57 + "!" * 33,
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> < |im_end| >",
)


@pytest.fixture(scope="session")
def texts() -> tuple[str, ...]:
    """Fixed texts, then random mixtures of their characters (seed 0)."""
    rng = random.Random(0)
    letters = sorted({letter for text in TEXTS for letter in text})
    return (*TEXTS, *("".join(rng.choices(letters, k=rng.randrange(60))) for _ in range(300)))


@pytest.fixture(scope="session")
def embedded_files() -> ModelFiles:
    return open_model(embedded_model_path())


@pytest.fixture(scope="session")
def embedded(embedded_files: ModelFiles) -> Tokenizer:
    return load_tokenizer(embedded_files)


@pytest.fixture(scope="session")
def gguf_files() -> Callable[..., Any]:
    """What load_tokenizer reads of a GGUF file, from `tokenizer.ggml.*` values."""

    def make(*, chat_template: str | None = None, **values: Any) -> Any:
        metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
        if chat_template is not None:
            metadata["tokenizer.chat_template"] = chat_template
        return SimpleNamespace(
            kind="gguf", path=Path("x.gguf"), metadata=metadata, eos_token_ids=(2,), bos_token_id=1
        )

    return make
