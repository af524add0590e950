"""Workloads that belong to no engine, from a file that every engine's runner reads.

The file is Python that imports no engine. It says which models there are (`MODELS`: name -> config.json), what is asked
(`WORKLOADS`: name -> at least its `kind`; `requests(name, warmup=False)`: a list of {"prompt": token ids, "max_tokens":
count}; `temperature(name)`), a checksum of what is asked (`digest(name)`), and what a step cannot do without
(`stats(model)`, `prefill_flops(model, lengths)`).
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
"""What is measured here. Files may hold further kinds, such as requests over HTTP."""

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
        """The workloads that can be measured here, in the file's order."""
        return [name for name, entry in self._module.WORKLOADS.items() if entry["kind"] in KINDS]

    def workload(self, name: str) -> Workload:
        if name not in self.names():
            raise ConfigError(
                f"there is no workload {name!r}; there are {', '.join(self.names())}{nearest(name, self.names())}"
            )
        file = self._module
        return Workload(
            name=name,
            kind=file.WORKLOADS[name]["kind"],
            temperature=file.temperature(name),
            digest=file.digest(name),
            jobs=_jobs(file.requests(name)),
            warmup=_jobs(file.requests(name, warmup=True)),
        )

    def write_model(self, name: str, folder: Path) -> Path:
        """A directory under `folder` that holds the model's config.json and nothing else."""
        directory = folder / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self._settings(name), indent=1) + "\n")
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


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("peer_workloads", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"{path} is no Python file with workloads")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _jobs(requests: Sequence[dict[str, Any]]) -> list[Job]:
    return [Job(tuple(each["prompt"]), each["max_tokens"]) for each in requests]
