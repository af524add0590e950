"""Greedy tokens of the embedded model beside those of transformers with the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from embedded_reference import embedded_model
from greedy_answers import NUM_TOKENS, continuations, first_difference
from test_accuracy_embedded import LARGEST_GAP, LARGEST_GAP_OF_8_BITS
from transformers import LlamaForCausalLM

from evidence.part import Findings, Part, cell
from lockstep.engine.llm import LLM
from peers.markdown import table

WAYS: Mapping[str, tuple[Mapping[str, Any], float]] = {
    "float32": ({"dtype": "float32"}, LARGEST_GAP),
    "default": ({}, LARGEST_GAP_OF_8_BITS),
}
"""Way -> options, and the logit gap below which rounding explains a difference."""


def collect() -> Findings:
    reference = embedded_model()
    ways = {way: _compared(reference, dict(options), gap) for way, (options, gap) in WAYS.items()}
    return {"passed": all(way["passed"] for way in ways.values()), "num_tokens": NUM_TOKENS, "ways": ways}


def page(found: Mapping[str, Any]) -> str:
    num_tokens = found["num_tokens"]
    text = [
        "The reference is transformers in float32 on the file's weights as the `gguf` package expands them. Equal are "
        "the tokens before the first that transformers would not have chosen; the gap is by how much the logit of "
        "its own choice is larger."
    ]
    for way, of in found["ways"].items():
        rows = [["prompt", "tokens equal", "ours", "transformers", "gap"]]
        for one in of["prompts"]:
            differing = one["first_difference"]
            rest = ["", "", ""]
            if differing is not None:
                rest = [cell(differing["ours"]), cell(differing["theirs"]), f"{differing['gap']:.4f}"]
            num_equal = num_tokens if differing is None else differing["at"]
            rows.append([cell(one["prompt"]), f"{num_equal} of {num_tokens}", *rest])
        meaning = "products of float32" if way == "float32" else "as it runs unless told: 8-bit activations"
        text.append(
            f"### {way}: {meaning}\n\nA gap of {of['largest_gap']} would be a mistake.\n\n{table(rows)}"
        )
    return "\n\n".join(text)


def _compared(reference: LlamaForCausalLM, options: dict[str, Any], largest_gap: float) -> dict[str, Any]:
    rows, gaps = [], [0.0]
    with LLM(threads=1, max_total_tokens=4096, **options) as llm:
        for prompt, answer in continuations(llm).items():
            differing = first_difference(reference, answer.prompt_token_ids, answer.token_ids)
            shown = None
            if differing is not None:
                words = {who: llm.tokenizer.decode([getattr(differing, who)]) for who in ("ours", "theirs")}
                shown = asdict(differing) | words
                gaps.append(differing.gap)
            rows.append({"prompt": prompt, "text": answer.text, "first_difference": shown})
    return {"passed": max(gaps) < largest_gap, "largest_gap": largest_gap, "prompts": rows}


PART = Part("greedy", f"{NUM_TOKENS} greedy tokens, beside transformers", collect, page)
