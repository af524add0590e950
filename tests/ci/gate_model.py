"""A tiny random model with a byte tokenizer, in a file that every command opens."""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFWriter, TokenType
from gguf_files import tiny_model, write_gguf
from tokenizers.pre_tokenizers import ByteLevel

END_ID = 257


def write_tiny_gguf(path: Path) -> Path:
    """Writes the model to `path`, which it returns."""
    return write_gguf(tiny_model("llama", vocab_size=END_ID + 1), path, add=_byte_tokenizer)


def _byte_tokenizer(writer: GGUFWriter) -> None:
    """Every byte is a token, one pair is (a file without merges is refused), and one token ends the answer."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*sorted(ByteLevel.alphabet()), "zq", "<end>"])
    writer.add_token_types([TokenType.NORMAL] * END_ID + [TokenType.CONTROL])
    writer.add_token_merges(["z q"])
    writer.add_eos_token_id(END_ID)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
