"""A model's files and its tokenizer, by the names of the options. Free of torch: the HTTP process uses it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lockstep.config import Given, wanted
from lockstep.core.errors import ModelFileError
from lockstep.formats import ModelFiles, embedded_model_path, open_model
from lockstep.formats.read_ahead import read_ahead
from lockstep.tokenizer.chat_template import ChatTemplate
from lockstep.tokenizer.loading import load_tokenizer
from lockstep.tokenizer.token_ids_only import TokenIdsOnly
from lockstep.tokenizer.tokenizer import Tokenizer

DUMMY = "dummy"
"""The load format of weights that nobody trained."""


def open_files(model: str | None, revision: str | None = None, load_format: str = "files") -> ModelFiles:
    """The named model's files, or the embedded one's; those of weights too, unless they are dummies.

    Raises ModelFileError.
    """
    spec = embedded_model_path() if model is None else model
    return open_model(spec, revision=revision, weights=load_format != DUMMY)


def read_ahead_weights(given: Mapping[str, Given]) -> None:
    """Has a local model's weight files read in the background, from the first call on. For before torch is imported."""
    model = wanted(given, "model")
    if model is not None and wanted(given, "load_format") != DUMMY:
        read_ahead(Path(model).expanduser())


def open_tokenizer(
    files: ModelFiles, tokenizer: str | None, chat_template: str | None, *, skip: bool = False
) -> Tokenizer:
    """The model's tokenizer, or the one named, with the chat template of a file if one is named.

    With `skip` none is opened, and what stands in its place refuses text. Raises ModelFileError.
    """
    if skip:
        return TokenIdsOnly(eos_token_ids=files.eos_token_ids, bos_token_id=files.bos_token_id)
    loaded = load_tokenizer(files if tokenizer is None else open_model(tokenizer))
    if chat_template is not None:
        try:
            source = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFileError(f"--chat-template {chat_template} cannot be read: {error}") from error
        special_tokens = loaded.chat_template.special_tokens if loaded.chat_template is not None else {}
        loaded.chat_template = ChatTemplate(source, special_tokens, called=f"--chat-template {chat_template}")
        loaded.chat_template.check()
    return loaded
