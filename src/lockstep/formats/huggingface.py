"""A Hugging Face directory as a model: config.json, safetensors shards, what sentence-transformers declare."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lockstep.core.errors import ModelFileError
from lockstep.core.request import Pooling
from lockstep.formats.model_files import ModelFiles, TensorInfo, index_tensors
from lockstep.formats.rope import classic_rope
from lockstep.formats.safetensors_header import read_safetensors_header
from lockstep.formats.storage import unreadable

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# Checkpoints saved from the bare model, as embedding models are, lack the causal model's prefix.
_BARE_PREFIXES = ("embed_tokens.", "layers.", "norm.")


def open_directory(path: Path, name: str | None = None, *, weights: bool = True) -> ModelFiles:
    """Opens a directory with config.json and safetensors. Raises ModelFileError if one is missing or broken.

    Without `weights` safetensors are not looked at: there are no tensors.
    """
    config = read_json(path / "config.json")
    tensors = index_tensors(path, _tensor_infos(path)) if weights else {}
    config = classic_rope(config)
    config.setdefault("tie_word_embeddings", "lm_head.weight" not in tensors)
    generation_path = path / "generation_config.json"
    generation_config = read_json(generation_path) if generation_path.exists() else {}
    settings = config | {key: value for key, value in generation_config.items() if value is not None}
    bos_token_ids = _token_ids(path, "bos_token_id", settings)
    return ModelFiles(
        path=path,
        kind="huggingface",
        name=name or path.resolve().name,
        config=config,
        generation_config=generation_config,
        eos_token_ids=_token_ids(path, "eos_token_id", settings),
        bos_token_id=bos_token_ids[0] if bos_token_ids else None,
        pooling=_pooling(path),
        tensors=tensors,
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelFileError when it is missing, unreadable or something else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelFileError(
            f"{path.parent}: {path.name} is missing; the model is incomplete, fetch it again"
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: not valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: must hold a JSON object, not {reprlib.repr(value)}")
    return value


def _tensor_infos(path: Path) -> Iterable[TensorInfo]:
    for file in _weight_files(path):
        for tensor in read_safetensors_header(file):
            yield TensorInfo(
                name=f"model.{tensor.name}" if tensor.name.startswith(_BARE_PREFIXES) else tensor.name,
                storage_type=tensor.storage_type,
                shape=tensor.shape,
                file=file,
                offset=tensor.offset,
                nbytes=tensor.nbytes,
                stored_name=tensor.name,
            )


def _weight_files(path: Path) -> list[Path]:
    """The one file, or else the shards that the index names, or else what there is. Pickle files are never read."""
    if (path / _SINGLE).exists():
        return [path / _SINGLE]
    if (path / _INDEX).exists():
        return _indexed_files(path)
    found = sorted(path.glob("*.safetensors"))
    if found:
        return found
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ModelFileError(pickle_refusal(path, pickles[0]))
    raise ModelFileError(f"{path}: no weights (*.safetensors) here; the model is incomplete, fetch it again")


def pickle_refusal(path: Path, found: str) -> str:
    """Why pickle weights are not read, in one line."""
    return (
        f"{path}: {found} is a pickle, which can run any code when it is read; convert the model to safetensors"
    )


def _indexed_files(path: Path) -> list[Path]:
    index = path / _INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_file_name(name) for name in weight_map.values()):
        raise ModelFileError(
            f"{index}: weight_map must map tensor names to files of this directory; fetch it again"
        )
    files = [path / name for name in dict.fromkeys(weight_map.values())]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ModelFileError(
            f"{path}: {missing[0]} is missing ({len(missing)} of {len(files)} shards); fetch it again"
        )
    return files


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and value.endswith(".safetensors") and Path(value).name == value


def _token_ids(path: Path, key: str, settings: Mapping[str, Any]) -> tuple[int, ...]:
    value = settings.get(key)
    token_ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int and token_id >= 0 for token_id in token_ids):
        raise ModelFileError(f"{path}: {key} must be a token id or a list of them, not {reprlib.repr(value)}")
    return tuple(token_ids)


def _pooling(path: Path) -> Pooling | None:
    """Mean or last when modules.json, sentence-transformers' list of modules, has such a pooling module."""
    modules_path = path / "modules.json"
    if not modules_path.exists():
        return None
    try:
        modules = json.loads(modules_path.read_bytes())
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        folders = [
            Path(module["path"]) for module, kind in zip(modules, kinds, strict=True) if kind == "Pooling"
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelFileError(f"{modules_path}: not a list of modules ({error}); fetch it again") from error
    others = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if others:
        raise ModelFileError(f"{modules_path}: embeddings that go through {others[0]} are not supported")
    if not folders:
        return None
    settings = read_json(path / folders[0] / "config.json")
    if settings.get("pooling_mode_mean_tokens") or settings.get("pooling_mode") == "mean":
        return "mean"
    if settings.get("pooling_mode_lasttoken") or settings.get("pooling_mode") == "lasttoken":
        return "last"
    return None
