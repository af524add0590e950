"""The embedded model on an NVIDIA GPU: right answers, with graphs and without, and the scores of float32."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import PAGE_SIZE, TRITON, Logits, share_of_accepted, with_weights_in

sys.path.append(str(Path(__file__).parents[1] / "accuracy"))

from embedded_reference import embedded_model
from teacher_forcing import TeacherForcedEngine, transformers_logits

from lockstep import LLM, SamplingParams
from lockstep.engine.model_files import open_files, open_tokenizer
from lockstep.formats import embedded_model_path

pytestmark = pytest.mark.suite("cuda-1", seconds=40)

BRIEF = SamplingParams(temperature=0.0, max_tokens=24)
QUESTIONS = {
    "What is the capital of Japan?": "Tokyo",
    "What is the capital of Germany?": "Berlin",
    "What is the capital of Egypt?": "Cairo",
}
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Zürich, Kraków and Malmö are cities in Europe, each on a river or on the sea, and each a few hundred years old.",
)
GRAPHS: dict[str, Any] = {"graphs": "full", "extend_graphs": "piecewise"}
NO_GRAPHS: dict[str, Any] = {"graphs": "off", "extend_graphs": "off"}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Threads that wait for each other take longer than the host's part of the work."""
    torch.set_num_threads(1)


def answers(device: str, **options: Any) -> list[str]:
    with LLM(device=device, max_total_tokens=4096, **TRITON, **options) as llm:
        return [llm.chat([{"role": "user", "content": question}], BRIEF).text for question in QUESTIONS]


def test_answers_are_right_with_graphs_and_without() -> None:
    found = answers("cuda", **GRAPHS)
    for answer, word in zip(found, QUESTIONS.values(), strict=True):
        assert word in answer
    assert answers("cuda", **NO_GRAPHS) == found


@cache
def reference() -> tuple[list[list[int]], Logits, Logits]:
    """The texts' tokens, their logits by transformers in float32, and in bfloat16."""
    tokenizer = open_tokenizer(open_files(None), None, None)
    sequences, model = [tokenizer.encode(text) for text in TEXTS], embedded_model()
    expected = transformers_logits(model, sequences)
    return sequences, expected, transformers_logits(with_weights_in(model, torch.bfloat16), sequences)


def error(device: str, **how: Any) -> float:
    """How far the engine's logits of the texts are from float32; 1 is all that is accepted."""
    sequences, expected, in_bfloat16 = reference()
    engine = TeacherForcedEngine(
        embedded_model_path(),
        device=device,
        dtype="bfloat16",
        page_size=PAGE_SIZE,
        max_running_requests=4,
        probed=False,
        **TRITON,
        **how,
    )
    prompts = [len(tokens) // 2 for tokens in sequences]
    found = engine.logits(sequences, num_prompt_tokens=prompts, chunk=8)
    return share_of_accepted(found, expected, in_bfloat16)


@pytest.mark.parametrize("way", [GRAPHS, NO_GRAPHS], ids=["graphs", "eager"])
def test_scores_are_those_of_float32_but_for_rounding(way: dict[str, Any]) -> None:
    assert 0 < error("cuda", **way) < 1


def test_the_tolerance_rejects_a_slightly_wrong_model() -> None:
    assert open_files(None).config["rope_theta"] == 1e5
    assert error("cuda", changed={"rope_theta": 1e4}, **NO_GRAPHS) > 2
