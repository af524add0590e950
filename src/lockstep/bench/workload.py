"""What is asked: prompts by seed, or from a file."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.core.errors import ConfigError, nearest

DEFAULT_REQUESTS = 64
DEFAULT_INPUT_TOKENS = 128
DEFAULT_OUTPUT_TOKENS = 128

_FIELDS = ("prompt", "prompt_token_ids", "max_tokens")


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt, as text or token ids, and how many tokens to generate: exactly so many, whatever they are."""

    prompt: str | tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class RandomWorkload:
    """Prompts of equally likely token ids, decided by the seed and the number of the round alone."""

    seed: int
    num_requests: int = DEFAULT_REQUESTS
    input_tokens: int = DEFAULT_INPUT_TOKENS
    output_tokens: int = DEFAULT_OUTPUT_TOKENS

    def batches(self, vocab_size: int) -> Iterator[list[Job]]:
        """One batch after the other, without end; no two share a prompt, so that no round warms the next."""
        return (self._batch(number, vocab_size) for number in itertools.count())

    def describe(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "num_requests": self.num_requests,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
        }

    def _batch(self, number: int, vocab_size: int) -> list[Job]:
        draws = random.Random(f"{self.seed}/{number}")
        return [
            Job(tuple(draws.choices(range(vocab_size), k=self.input_tokens)), self.output_tokens)
            for _ in range(self.num_requests)
        ]


@dataclass(frozen=True, slots=True)
class FileWorkload:
    """The jobs of a file, all of them in each batch."""

    path: Path
    jobs: tuple[Job, ...]

    def batches(self, vocab_size: int) -> Iterator[list[Job]]:
        """The same batch again and again: whoever measures forgets cached prefixes in between."""
        return itertools.repeat(list(self.jobs))

    def describe(self) -> dict[str, Any]:
        return {
            "workload": str(self.path),
            "num_requests": len(self.jobs),
            "output_tokens": sum(job.max_tokens for job in self.jobs),
        }


Workload = RandomWorkload | FileWorkload


def choose_workload(
    path: Path | None,
    *,
    seed: int,
    num_requests: int | None,
    input_tokens: int | None,
    output_tokens: int | None,
) -> Workload:
    """The file's jobs, where `output_tokens` serves those that name none, or random ones.

    None means the default. Raises ConfigError when a file is given with what describes random prompts.
    """
    if path is None:
        return RandomWorkload(
            seed,
            num_requests or DEFAULT_REQUESTS,
            input_tokens or DEFAULT_INPUT_TOKENS,
            output_tokens or DEFAULT_OUTPUT_TOKENS,
        )
    for flag, value in (("--num-requests", num_requests), ("--input-tokens", input_tokens)):
        if value is not None:
            raise ConfigError(f"{flag} describes random prompts; leave it out, --workload {path} says it")
    return FileWorkload(path, tuple(read_jobs(path, output_tokens or DEFAULT_OUTPUT_TOKENS)))


def read_jobs(path: Path, default_max_tokens: int) -> list[Job]:
    """The jobs of a file of JSON lines: `prompt` or `prompt_token_ids`, and optionally `max_tokens`.

    Blank lines are skipped. Raises ConfigError naming the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--workload {path} cannot be read: {error}") from None
    jobs = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                jobs.append(_job(line, default_max_tokens))
            except ValueError as error:
                raise ConfigError(f"--workload {path}, line {number}: {error}") from None
    if not jobs:
        raise ConfigError(
            f'--workload {path} holds no request; a line is such as {{"prompt": "Hi", "max_tokens": 8}}'
        )
    return jobs


def _job(line: str, default_max_tokens: int) -> Job:
    """Raises ValueError with what is wrong."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError("must be a JSON object")
    for name in fields:
        if name not in _FIELDS:
            raise ValueError(f"unknown field {name!r}{nearest(name, _FIELDS)} (known: {', '.join(_FIELDS)})")
    if ("prompt" in fields) == ("prompt_token_ids" in fields):
        raise ValueError("needs either prompt or prompt_token_ids")
    max_tokens = fields.get("max_tokens", default_max_tokens)
    if not _is_count(max_tokens) or max_tokens < 1:
        raise ValueError(f"max_tokens must be an integer from 1 up, not {max_tokens!r}")
    if "prompt" in fields:
        if not isinstance(fields["prompt"], str) or not fields["prompt"]:
            raise ValueError("prompt must be a text that is not empty")
        return Job(fields["prompt"], max_tokens)
    token_ids = fields["prompt_token_ids"]
    if not isinstance(token_ids, list) or not token_ids or not all(map(_is_count, token_ids)):
        raise ValueError("prompt_token_ids must be a list of integers from 0 up that is not empty")
    return Job(tuple(token_ids), max_tokens)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
