"""What a peer is: an engine with one model loaded, that answers token lists greedily."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

TokenIds = Sequence[int]


@dataclass(frozen=True)
class Answer:
    """One batch, answered. Times are seconds since it was handed over.

    `first_token_s` is when the first token of the batch was there; `first_token_ids` has one entry per prompt.
    """

    first_token_s: float
    seconds: float
    num_tokens: int
    first_token_ids: list[int]


class Peer(Protocol):
    """Made of a GGUF file and a number of threads."""

    def versions(self) -> dict[str, str]:
        """Distribution -> version of what computes."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids by the peer's own tokenizer."""
        ...

    def generate(self, prompts: Sequence[TokenIds], num_tokens: int) -> Answer:
        """Answers all prompts at once, each with exactly `num_tokens`: an end token does not end it."""
        ...


PEERS = {
    "lockstep": ("peers.lockstep_peer", "LockstepPeer"),
    "llama.cpp": ("peers.llama_cpp_peer", "LlamaCppPeer"),
    "openvino": ("peers.openvino_peer", "OpenVinoPeer"),
    "transformers": ("peers.transformers_peer", "TransformersPeer"),
}
"""Peer -> the module and class that know it."""


def open_peer(name: str, file: str, threads: int) -> Peer:
    """Loads the model. Needs the environment of that peer."""
    module, class_name = PEERS[name]
    opened: Peer = getattr(importlib.import_module(module), class_name)(file, threads)
    return opened
