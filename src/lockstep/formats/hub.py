"""Fetches models from the Hugging Face Hub: configuration, tokenizer and safetensors, never code or pickles."""

from __future__ import annotations

import re
from pathlib import Path

from lockstep.core.errors import ModelFileError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_WANTED = ["*.json", "*.jinja", "*.model"]
_WEIGHTS = ["*.safetensors"]
_UNWANTED = ["consolidated*", "original/*", "onnx/*"]


def is_hub_id(spec: str) -> bool:
    """True for "organisation/name"."""
    return _HUB_ID.fullmatch(spec) is not None


def download(hub_id: str, revision: str | None = None, hint: str = "", *, weights: bool = True) -> Path:
    """The local snapshot of a Hub model, with or without its weights, fetched where it is not cached yet.

    `revision` is a branch, tag or commit; `hint` is appended to every refusal. Raises ModelFileError when
    huggingface_hub is not installed, the model does not exist or may not be read, or there is no network.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelFileError(
            f"{hub_id!r} is not a local path; to fetch it from the Hub, `pip install huggingface_hub`{hint}"
        ) from error
    try:
        wanted = [*_WANTED, *(_WEIGHTS if weights else ())]
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=wanted, ignore_patterns=_UNWANTED)
        )
    except Exception as error:  # Its errors come from several HTTP libraries, by version.
        raise ModelFileError(f"{hub_id!r} is not a local path and {_reason(error)}{hint}") from error


def _reason(error: Exception) -> str:
    name = type(error).__name__
    if name == "GatedRepoError":
        return "is gated on the Hub: accept its terms there, then run `hf auth login`"
    if name == "RepositoryNotFoundError":
        return "the Hub has no such public model"
    if name in ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError"):
        return "the Hub cannot be reached from here; give a local directory or .gguf file"
    return (
        f"fetching it from the Hub failed ({name}: {str(error).strip().splitlines()[0] if str(error) else ''})"
    )
