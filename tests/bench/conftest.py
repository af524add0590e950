"""A tiny random model with a byte tokenizer, and a fake server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_completions_server import FakeCompletions
from gguf import GGUFWriter, TokenType
from gguf_files import tiny_model, write_gguf
from tokenizers.pre_tokenizers import ByteLevel

NUM_BYTES = 256
VOCAB_SIZE = NUM_BYTES + 2


def _add_byte_tokenizer(writer: GGUFWriter) -> None:
    """Every byte is a token, one pair is (a file without merges is refused), and one token ends the answer."""
    tokens = [*sorted(ByteLevel.alphabet()), "zq", "<end>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * (NUM_BYTES + 1) + [TokenType.CONTROL])
    writer.add_token_merges(["z q"])
    writer.add_eos_token_id(VOCAB_SIZE - 1)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Architecture -> file. The models may answer with any token, the one that ends an answer included."""
    folder = tmp_path_factory.mktemp("models")
    return {
        architecture: write_gguf(
            tiny_model(architecture, vocab_size=VOCAB_SIZE),
            folder / f"{architecture}.gguf",
            add=_add_byte_tokenizer,
        )
        for architecture in ("llama", "qwen3", "gemma3")
    }


@pytest.fixture(scope="session")
def model(tiny_models: dict[str, Path]) -> Path:
    return tiny_models["llama"]


@pytest.fixture
def fake_server() -> Iterator[FakeCompletions]:
    with FakeCompletions() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
