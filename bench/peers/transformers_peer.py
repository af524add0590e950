"""Hugging Face transformers, as `lockstep bench --compare transformers` runs it: bf16, SDPA, one padded batch.

The class lives in Lockstep's package, so this peer shares Lockstep's environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from lockstep.bench.transformers_contender import TransformersContender
from lockstep.bench.workload import Job
from lockstep.engine.model_files import open_files, open_tokenizer
from peers.peer import Answer, TokenIds


class TransformersPeer:
    """The file's weights, dequantised to bfloat16."""

    def __init__(self, file: str, threads: int) -> None:
        self._contender = TransformersContender({"model": file, "dtype": "bfloat16", "threads": threads})
        self._tokenizer = open_tokenizer(open_files(file), None, None)

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("transformers", "torch")}

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def generate(self, prompts: Sequence[TokenIds], num_tokens: int) -> Answer:
        found = self._contender.run([Job(tuple(prompt), num_tokens) for prompt in prompts])
        return Answer(
            found.first_token_s[0], found.seconds, found.num_output_tokens, list(found.first_token_ids)
        )
