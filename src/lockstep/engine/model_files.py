"""A model's files and its tokenizer, by the names of the options. Free of torch: the HTTP process uses it."""

from __future__ import annotations

from pathlib import Path

from lockstep.core.errors import ModelFileError
from lockstep.formats import ModelFiles, embedded_model_path, open_model
from lockstep.tokenizer.chat_template import ChatTemplate
from lockstep.tokenizer.loading import load_tokenizer
from lockstep.tokenizer.tokenizer import Tokenizer


def open_files(model: str | None, revision: str | None = None) -> ModelFiles:
    """The named model's files, or the embedded one's. Raises ModelFileError."""
    return open_model(embedded_model_path() if model is None else model, revision=revision)


def open_tokenizer(files: ModelFiles, tokenizer: str | None, chat_template: str | None) -> Tokenizer:
    """The model's tokenizer, or the one named, with the chat template of a file if one is named.

    Raises ModelFileError.
    """
    loaded = load_tokenizer(files if tokenizer is None else open_model(tokenizer))
    if chat_template is not None:
        try:
            source = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFileError(f"--chat-template {chat_template} cannot be read: {error}") from error
        special_tokens = loaded.chat_template.special_tokens if loaded.chat_template is not None else {}
        loaded.chat_template = ChatTemplate(source, special_tokens)
    return loaded
