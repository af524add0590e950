"""The models that are measured, and each one's file in every format that a peer is given."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from lockstep.core.errors import ConfigError, nearest
from lockstep.formats import embedded_model_path, open_model
from make_gguf import QWEN2_HALF_BILLION, write_random_model
from peers.environments import module_environment, run_module

SMALL, SHAPE = "smollm2-135m", "qwen2-0.5b-shape"
REQUANTISED = {SMALL: ("Q4_0", "Q8_0", "F16"), SHAPE: ("Q8_0", "F16")}
"""Model -> the formats that llama.cpp makes of its first file."""


@dataclass(frozen=True)
class BenchModel:
    """A model with its files: format -> file. The first is the one that all others were made of."""

    name: str
    vocab_size: int
    files: dict[str, Path]

    @property
    def main_format(self) -> str:
        return next(iter(self.files))


def bench_model(name: str, cache: Path, *, make: bool = False) -> BenchModel:
    """A model by name, its files in the cache; with `make`, those that are missing are written (seconds each).

    Raises ConfigError for an unknown name, or a missing file without `make`.
    """
    if name not in REQUANTISED:
        known = ", ".join(REQUANTISED)
        raise ConfigError(f"unknown model {name!r} (known: {known}){nearest(name, REQUANTISED)}")
    folder = cache / "models"
    folder.mkdir(parents=True, exist_ok=True)
    main_format, main_file = _main_file(name, folder)
    if make and not main_file.exists():
        write_random_model(QWEN2_HALF_BILLION, main_file)
    files = {main_format: main_file, **{kind: folder / f"{name}-{kind}.gguf" for kind in REQUANTISED[name]}}
    for kind, file in files.items():
        if make and not file.exists():
            _requantise(main_file, file, kind, cache)
        if not file.exists():
            raise ConfigError(f"{file} is missing: run `python bench/cpu_peers.py prepare`")
    return BenchModel(name, int(open_model(main_file).config["vocab_size"]), files)


def _main_file(name: str, folder: Path) -> tuple[str, Path]:
    if name == SMALL:
        return "Q4_1", Path(embedded_model_path())
    return "Q4_0", folder / f"{name}.gguf"


def _requantise(source: Path, target: Path, kind: str, cache: Path) -> None:
    partial = target.with_suffix(".partial")
    command = run_module("llama.cpp", cache, "peers.llama_cpp_peer", str(source), str(partial), kind)
    if subprocess.run(command, env=module_environment()).returncode != 0:
        raise ConfigError(f"{source} could not be written as {kind}; see above")
    partial.rename(target)
