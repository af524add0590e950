"""Greedy answers of the embedded model and what transformers says in their place: continuations and simple facts."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from embedded_reference import greedy_answers, next_token_logits
from transformers import LlamaForCausalLM

from lockstep.core.sampling import SamplingParams
from lockstep.engine.llm import LLM, Completion
from lockstep.tokenizer.tokenizer import Tokenizer

NUM_TOKENS = 64
PROMPTS = (
    "The quick brown fox",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics state that",
    "To bake a loaf of bread, first",
    "In 1969, the first people",
    "Q: Why is the sky blue?\nA:",
    "Zürich, Kraków and Malmö are",
)

FACTS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "facts.json").read_text(encoding="utf-8"))
NUM_SIMPLE = 20
"""Facts that come first. On the others the model wavers: a rounding decides."""
FACT_TOKENS = 24


@dataclass(frozen=True)
class Difference:
    """The first token `ours` at which transformers would have taken another, whose logit is larger by `gap`."""

    at: int
    ours: int
    theirs: int
    gap: float


def continuations(llm: LLM) -> dict[str, Completion]:
    """`NUM_TOKENS` greedy tokens after each prompt."""
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    found = dict(zip(PROMPTS, llm.generate(PROMPTS, params), strict=True))
    assert all(len(answer.token_ids) == NUM_TOKENS for answer in found.values())
    return found


def first_difference(
    model: LlamaForCausalLM, prompt: Sequence[int], answer: Sequence[int]
) -> Difference | None:
    """None where the answer is greedy for transformers too: after each token it would have chosen the next."""
    logits_TV = next_token_logits(model, (*prompt, *answer), first=len(prompt))
    best_T, ours_T = logits_TV.argmax(-1), torch.tensor(answer)
    differing = (best_T != ours_T).nonzero().flatten().tolist()
    if not differing:
        return None
    at = differing[0]
    ours, theirs = int(ours_T[at]), int(best_T[at])
    return Difference(at, ours, theirs, (logits_TV[at, theirs] - logits_TV[at, ours]).item())


def facts_answered(llm: LLM) -> list[Completion]:
    """Ours to each fact's question."""
    params = SamplingParams(temperature=0.0, max_tokens=FACT_TOKENS)
    return llm.generate(_questions(llm.tokenizer), params)


def facts_by_reference(model: LlamaForCausalLM, tokenizer: Tokenizer) -> list[str]:
    """Those of transformers' own generation."""
    (end,) = tokenizer.eos_token_ids
    answers = greedy_answers(model, _questions(tokenizer), FACT_TOKENS, end)
    return [tokenizer.decode(answer) for answer in answers]


def is_right(fact: dict[str, Any], answer: str) -> bool:
    """Whether it contains an accepted answer as whole words, whatever the case."""
    return any(re.search(rf"\b{re.escape(accepted)}\b", answer, re.IGNORECASE) for accepted in fact["accepted"])


def _questions(tokenizer: Tokenizer) -> list[list[int]]:
    template = tokenizer.chat_template
    assert template is not None
    chats = [template.render([{"role": "user", "content": fact["question"]}]) for fact in FACTS]
    return [tokenizer.encode(chat, add_special_tokens=False) for chat in chats]
