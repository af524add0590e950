"""Whole models on the simulated device, through the door that users take."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf_files import tiny_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from lockstep.core.sampling import SamplingParams
from lockstep.engine.llm import LLM, Completion
from lockstep.ops import selection
from lockstep.ops.contract import Kernel
from lockstep.ops.registry import kernels
from lockstep.platforms.sim import SimPlatform

pytestmark = pytest.mark.suite("sim")

PROMPTS = [[1], [7, 8, 9], list(range(20, 90)), [5] * 33]
SMALL = {"vocab_size": 256, "initializer_range": 0.15, "eos_token_id": None, "bos_token_id": None}
MOE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}


def answers(directory: Path, device: str, **options: Any) -> tuple[list[Completion], set[str]]:
    params = SamplingParams(temperature=0.0, max_tokens=20, logprobs=2)
    with LLM(
        str(directory), device=device, dtype="float32", max_total_tokens=2048, threads=1, **options
    ) as llm:
        return llm.generate(PROMPTS, params), {binding.kernel.provider for binding in llm.kernel_report()}


def assert_same_answers(directory: Path, **options: Any) -> None:
    found, bound = answers(directory, "sim", **options)
    expected, _ = answers(directory, "cpu", **options)
    assert bound <= {"torch", "reference"}
    assert [each.text for each in found] == [each.text for each in expected]
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    gaps = [
        abs(a.logprob - b.logprob)
        for one, other in zip(found, expected, strict=True)
        for a, b in zip(one.logprobs, other.logprobs, strict=True)
    ]
    assert len(gaps) == 20 * len(PROMPTS) and max(gaps) < 1e-4


def test_llama(tiny_llama: Path) -> None:
    assert_same_answers(tiny_llama)


def test_llama_in_chunks_over_small_pages(tiny_llama: Path) -> None:
    assert_same_answers(tiny_llama, page_size=2, chunked_prefill_size=7)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_other_architectures(architecture: str, tiny_llama: Path, tmp_path: Path) -> None:
    tiny_model(architecture, **SMALL, pad_token_id=None).save_pretrained(tmp_path)
    shutil.copy(tiny_llama / "tokenizer.json", tmp_path)
    assert_same_answers(tmp_path)


def test_mixture_of_experts(tiny_llama: Path, tmp_path: Path) -> None:
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **MOE)).save_pretrained(tmp_path)
    shutil.copy(tiny_llama / "tokenizer.json", tmp_path)
    assert_same_answers(tmp_path)


@pytest.fixture
def fused_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """The device has kernels of fused operators, their references, and attention in parts. Counts their calls."""
    calls: Counter[str] = Counter()

    def together(op: str) -> Kernel:
        reference = kernels(op)[0]

        def called(*given: Any) -> None:
            calls[op] += 1
            reference.function(*given)

        return replace(reference, provider="together", function=called, platforms=frozenset({"sim"}))

    own = {op: (together(op),) for op in ("norm_rope_store", "norm_rope_attention_decode")}
    monkeypatch.setattr(selection, "kernels", lambda op: (*kernels(op), *own.get(op, ())))
    monkeypatch.setattr(SimPlatform, "attention_preference", ("reference",))
    yield calls


@pytest.mark.parametrize(
    "options", [{}, {"page_size": 4, "chunked_prefill_size": 9}], ids=["whole", "in chunks"]
)
def test_single_tokens_by_one_kernel(
    options: dict[str, Any], tiny_llama: Path, fused_here: Counter[str]
) -> None:
    """Bound by the engine where nothing forces a part; steps with longer spans take the parts."""
    found, bound = answers(tiny_llama, "sim", **options)
    assert "together" in bound and min(fused_here.values()) > 0 and len(fused_here) == 2
    num_steps = fused_here["norm_rope_attention_decode"]
    fused_here.clear()
    in_parts = ["norm_rope_attention_decode=reference"]
    expected, _ = answers(tiny_llama, "sim", force_kernel=in_parts, **options)
    assert set(fused_here) == {"norm_rope_store"} and fused_here["norm_rope_store"] > num_steps
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert [[found.logprob for found in each.logprobs] for each in found] == [
        [found.logprob for found in each.logprobs] for each in expected
    ]
