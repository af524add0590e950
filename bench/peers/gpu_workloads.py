"""Workloads that belong to no engine, from a file that every engine's runner reads.

The file is Python that imports no engine. It says which models there are (`MODELS`: name -> config.json), what is asked
(`WORKLOADS`: name -> at least its `kind`; `requests(name, warmup=False)`: a list of {"prompt": token ids, "max_tokens":
count}; `temperature(name)`), a checksum of what is asked (`digest(name)`), and what a step cannot do without
(`stats(model)`, `prefill_flops(model, lengths)`). Requests over HTTP are those of the kind `serving`, and arrive at
the seconds that `arrivals(count, rate_per_s)` lists.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

from lockstep.bench.workload import Job
from lockstep.core.errors import ConfigError, nearest

KINDS = ("decode", "prefill", "prefix", "throughput")
"""What is measured in one process. Files may hold further kinds."""
SERVING = "serving"

_NEEDED = ("MODELS", "WORKLOADS", "requests", "temperature", "digest", "stats", "prefill_flops")


@dataclass(frozen=True)
class Workload:
    """What is asked, and before it `warmup`: other tokens, so that no cached prefix answers what is timed."""

    name: str
    kind: str
    temperature: float
    digest: str
    jobs: Sequence[Job]
    warmup: Sequence[Job]

    @property
    def num_input_tokens(self) -> int:
        return sum(len(job.prompt) for job in self.jobs)

    @property
    def num_output_tokens(self) -> int:
        return sum(job.max_tokens for job in self.jobs)

    @property
    def shared_prefix(self) -> tuple[int, ...]:
        """Token ids that every prompt begins with."""
        columns = zip(*(job.prompt for job in self.jobs), strict=False)
        return tuple(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))


@dataclass(frozen=True)
class Costs:
    """What one model needs at least: bytes of weights that a step of one token reads, bytes of keys and values of one
    token. `reads_all_weights` is false for a mixture of experts, whose steps read the more the more tokens they have.
    """

    step_weight_bytes: int
    token_kv_bytes: int
    reads_all_weights: bool


class WorkloadFile:
    """The file at `path`. Raises ConfigError when it cannot be read or lacks something, or for an unknown name."""

    def __init__(self, path: Path) -> None:
        self._module = _load(path)
        missing = [name for name in _NEEDED if not hasattr(self._module, name)]
        if missing:
            raise ConfigError(f"{path} describes no workloads: it lacks {', '.join(missing)}")

    def names(self) -> list[str]:
        """The workloads that can be measured in one process, in the file's order."""
        return [name for name, entry in self._module.WORKLOADS.items() if entry["kind"] in KINDS]

    def require(self, name: str) -> None:
        """Raises ConfigError for a workload that is not there, or not for one process."""
        if name not in self.names():
            raise ConfigError(
                f"there is no workload {name!r}; there are {', '.join(self.names())}{nearest(name, self.names())}"
            )

    def workload(self, name: str) -> Workload:
        """One that `require` knows."""
        self.require(name)
        return self._workload(name)

    def serving(self) -> Workload:
        """The requests over HTTP."""
        for name, entry in self._module.WORKLOADS.items():
            if entry["kind"] == SERVING:
                return self._workload(name)
        raise ConfigError(f"{self._module.__file__} has no workload of the kind {SERVING!r}")

    def arrivals_s(self, count: int, rate_per_s: float) -> list[float]:
        """When each of `count` requests is sent, the first at 0, at `rate_per_s` on average; inf: all at once."""
        found: list[float] = self._module.arrivals(count, rate_per_s)
        return found

    def _workload(self, name: str) -> Workload:
        file = self._module
        return Workload(
            name=name,
            kind=file.WORKLOADS[name]["kind"],
            temperature=file.temperature(name),
            digest=file.digest(name),
            jobs=_jobs(file.requests(name)),
            warmup=_jobs(file.requests(name, warmup=True)),
        )

    def write_model(self, name: str, folder: Path, *, tokenizer: bool = False) -> Path:
        """A directory under `folder` that holds the model's config.json, and `tokenizer.json` only if asked for."""
        directory = folder / name
        directory.mkdir(parents=True, exist_ok=True)
        settings = self._settings(name)
        (directory / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
        if tokenizer:
            (directory / "tokenizer.json").write_text(json.dumps(byte_tokenizer(settings["vocab_size"])))
        return directory

    def costs(self, model: str) -> Costs:
        stats = self._module.stats(model)
        return Costs(
            step_weight_bytes=stats["decode_weight_bytes_b1"],
            token_kv_bytes=stats["kv_bytes_per_token"],
            reads_all_weights="num_experts" not in self._settings(model),
        )

    def prefill_flops(self, model: str, lengths: Sequence[int]) -> int:
        """Operations of causal prompts of these lengths."""
        return int(self._module.prefill_flops(model, lengths))

    def _settings(self, model: str) -> dict[str, Any]:
        models: dict[str, dict[str, Any]] = self._module.MODELS
        if model not in models:
            raise ConfigError(
                f"there is no model {model!r}; there are {', '.join(models)}{nearest(model, models)}"
            )
        return models[model]


def byte_tokenizer(vocab_size: int) -> dict[str, Any]:
    """A tokenizer.json whose every id has a text: the 256 bytes first, then " w256", " w257" and so on.

    What a server does to make tokens into text it does here too. Raises ConfigError for fewer ids than bytes.
    """
    if vocab_size < 256:
        raise ConfigError(f"a vocabulary of {vocab_size} tokens has no room for the 256 bytes")
    # As GPT-2 spells bytes: those that print stand for themselves, the others are counted from U+0100 on.
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(byte) for byte in printed] + [chr(0x100 + at) for at in range(256 - len(printed))]
    words = [f"\u0120w{token_id}" for token_id in range(256, vocab_size)]
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocabulary = {text: token_id for token_id, text in enumerate(letters + words)}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": by_bytes,
        "decoder": by_bytes,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("peer_workloads", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"{path} is no Python file with workloads")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _jobs(requests: Sequence[dict[str, Any]]) -> list[Job]:
    return [Job(tuple(each["prompt"]), each["max_tokens"]) for each in requests]
