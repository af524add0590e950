"""Tiny random models in directories that `LLM` can open, and how answers of two runs are compared."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf_files import tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel

from lockstep.core.step import TokenLogprob
from lockstep.engine.llm import LLM, Choice, Completion

END = "<|end|>"
END_ID = 256
VOCAB_SIZE = 260
PAGE_SIZE = 4
TOLERANCE = 2e-5


def make_tiny(
    directory: Path, architecture: str = "llama", *, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """Saves a random float32 model whose tokens are the 256 bytes, an end token and three ids without a text."""
    # A spread of weights that makes attention sharp: the usual one would hide most mistakes.
    settings: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "initializer_range": 0.15, "eos_token_id": END_ID}
    model = tiny_model(
        architecture, seed=seed, **settings | {"bos_token_id": None, "pad_token_id": None} | overrides
    )
    model.save_pretrained(directory)
    alphabet = {letter: at for at, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    return model


def open_tiny(directory: Path, **options: Any) -> LLM:
    """An LLM in float32 on one thread, with small pages and room for some twenty prompts."""
    settings: dict[str, Any] = {
        "dtype": "float32",
        "threads": 1,
        "page_size": PAGE_SIZE,
        "max_total_tokens": 4096,
    }
    return LLM(str(directory), **settings | options)


def random_prompts(lengths: Sequence[int], seed: int = 11) -> list[list[int]]:
    """Random bytes as token ids, one list for each length."""
    print(f"seed {seed}")
    chooser = random.Random(seed)
    return [[chooser.randrange(END_ID) for _ in range(length)] for length in lengths]


def logprob_gap(found: Sequence[TokenLogprob], expected: Sequence[TokenLogprob]) -> float:
    """The largest difference of log-probabilities, best alternatives included, of the same tokens."""
    gaps = [0.0]
    for one, other in zip(found, expected, strict=True):
        assert one.token_id == other.token_id and len(one.top) == len(other.top)
        gaps.append(abs(one.logprob - other.logprob))
        # By rank, not by id: two alternatives that are nearly equal may change places.
        gaps.extend(abs(a - b) for (_, a), (_, b) in zip(one.top, other.top, strict=True))
    return max(gaps)


def assert_same_choice(found: Choice, expected: Choice, tolerance: float = TOLERANCE) -> None:
    """The same tokens, text and ending, and the same log-probabilities up to rounding."""
    assert found.token_ids == expected.token_ids
    assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason)
    assert logprob_gap(found.logprobs, expected.logprobs) < tolerance


def assert_same(
    found: Sequence[Completion], expected: Sequence[Completion], tolerance: float = TOLERANCE
) -> None:
    """The same answers, choice by choice, and the same log-probabilities of prompts."""
    for one, other in zip(found, expected, strict=True):
        for choice, twin in zip(one.choices, other.choices, strict=True):
            assert_same_choice(choice, twin, tolerance)
        assert logprob_gap(one.prompt_logprobs, other.prompt_logprobs) < tolerance
