"""A tiny model of every family with bfloat16 weights, and how far from float32 its logits may be."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.append(str(Path(__file__).parents[1] / "model"))

from teacher_forcing import (
    largest_difference,
    random_sequences,
    root_mean_square,
    transformers_logits,
    with_weights_in,
)

Logits = list[torch.Tensor]

PAGE_SIZE = 16
ERRORS_ACCEPTED = {root_mean_square: 1.2, largest_difference: 1.5}
"""Times what transformers' own bfloat16 run is off. It rounds wherever ours does, and in more places: on a processor
ours is off by 0.5 to 0.95 of that. Which way a value falls differs, and moves the largest of 100,000 errors more than
their mean."""
WAVERING = 0.06
"""Of the spread of a router's scores: choices of experts that are closer than this may be tipped by rounding."""

SIZES: Mapping[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    # The usual 0.02 would leave attention nearly uniform, and no mistake in it would be seen.
    "initializer_range": 0.05,
}
HALF_HEADS = {"head_dim": 64, "num_attention_heads": 8}
MHA, MQA = {"num_key_value_heads": 4}, {"num_key_value_heads": 1}
WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "num_hidden_layers": 3}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 8,
    "query_pre_attn_scalar": 128,
    "tie_word_embeddings": True,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}

TRITON: dict[str, Any] = {"force_kernel": ("attention_extend=triton",)}
"""FlashInfer would compile a kernel of its own for windows and for each head size, for minutes."""


@dataclass(frozen=True)
class Variant:
    """Settings of a config.json, options of the engine, and what transformers' attention has to be told by hand."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    by_hand: Mapping[str, Any] = field(default_factory=dict)


VARIANTS: Mapping[str, Mapping[str, Variant]] = {
    "LlamaForCausalLM": {
        "plain": Variant(),
        "tied, mqa": Variant({"tie_word_embeddings": True} | MQA),
        "biases, mha": Variant({"attention_bias": True, "mlp_bias": True} | MHA),
        "half heads, llama3": Variant(HALF_HEADS | {"rope_parameters": LLAMA3}, TRITON),
    },
    "Qwen2ForCausalLM": {
        "plain": Variant(),
        "tied, mqa": Variant({"tie_word_embeddings": True} | MQA),
        "windows": Variant(WINDOWS, TRITON),
    },
    "Qwen3ForCausalLM": {
        "plain": Variant(),
        "tied, biases": Variant({"tie_word_embeddings": True, "attention_bias": True}),
        "windows, half heads": Variant(WINDOWS | HALF_HEADS, TRITON),
    },
    "Gemma3ForCausalLM": {
        "plain": Variant(GEMMA, TRITON),
        "untied, mqa, capped logits": Variant(
            GEMMA | MQA | {"tie_word_embeddings": False, "final_logit_softcapping": 5.0}, TRITON
        ),
        # transformers reads the setting, but hands it to no attention function.
        "capped scores": Variant(GEMMA | {"attn_logit_softcapping": 2.0}, by_hand={"softcap": 2.0}),
        "wide heads": Variant(GEMMA | {"head_dim": 256}, TRITON),
    },
    "Qwen3MoeForCausalLM": {
        "plain": Variant(EXPERTS),
        "renormalised, one layer dense": Variant(
            EXPERTS | {"norm_topk_prob": True, "mlp_only_layers": [1], "num_hidden_layers": 3}
        ),
    },
}
ALL = [(architecture, variant) for architecture, variants in VARIANTS.items() for variant in variants]


class Case:
    """A random model, saved, known tokens of these lengths, and what transformers computes with them."""

    def __init__(self, architecture: str, variant: str, path: Path, lengths: Sequence[int]) -> None:
        found = VARIANTS[architecture][variant]
        self.path, self._by_hand = path, found.by_hand
        self.options = {"dtype": "bfloat16", "page_size": PAGE_SIZE, **found.options}
        self._model = with_weights_in(random_model(architecture, {**SIZES, **found.settings}), torch.bfloat16)
        self._model.save_pretrained(path)
        self.sequences = random_sequences(SIZES["vocab_size"], lengths)
        if "num_experts" in found.settings:
            settle_choices(with_weights_in(self._model, torch.float32), self.sequences)

    @cached_property
    def in_bfloat16(self) -> Logits:
        """Logits [T, V] of each sequence, every operator in bfloat16."""
        return self._logits(torch.bfloat16)

    @cached_property
    def expected(self) -> Logits:
        """Logits [T, V] of each sequence, the same weights with every operator in float32."""
        return self._logits(torch.float32)

    def _logits(self, dtype: torch.dtype) -> Logits:
        return transformers_logits(with_weights_in(self._model, dtype), self.sequences, **self._by_hand)

    def error(self, found: Logits) -> float:
        """How far logits of each sequence's last tokens are from float32; 1 is all that is accepted."""
        ends = [slice(-len(logits_TV), None) for logits_TV in found]
        known = zip(self.expected, self.in_bfloat16, ends, strict=True)
        pairs = [(expected[end], in_bfloat16[end]) for expected, in_bfloat16, end in known]
        return share_of_accepted(found, *map(list, zip(*pairs, strict=True)))


def share_of_accepted(found: Logits, expected: Logits, in_bfloat16: Logits) -> float:
    """The larger of both errors against `expected`, as a share of what is accepted where `in_bfloat16` are those of
    transformers."""
    shares = []
    for measure, accepted in ERRORS_ACCEPTED.items():
        ours, theirs = measure(found, expected), measure(in_bfloat16, expected)
        print(f"{measure.__name__}: {ours:.5f}, of transformers {theirs:.5f}: {ours / theirs:.2f}")
        shares.append(ours / (accepted * theirs))
    return max(shares)


def random_model(architecture: str, settings: Mapping[str, Any]) -> transformers.PreTrainedModel:
    """A model of transformers with random weights in all its parts."""
    model_class = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # Norms start as constants and biases as zeros, which would hide a mistake.
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if name.endswith("mlp.gate.weight"):  # A router of zeros would leave every choice a tie.
                parameter.normal_(0, settings["initializer_range"])
    return model


@torch.no_grad()
def settle_choices(model: transformers.PreTrainedModel, sequences: Sequence[list[int]]) -> None:
    """Draws tokens anew, in place, until no choice of experts wavers: one that is tipped moves logits more than all
    other rounding."""
    chooser, most = random.Random(5), model.config.num_experts_per_tok
    for tokens in sequences:
        while True:
            scores_LTE = torch.stack(model(torch.tensor([tokens]), output_router_logits=True).router_logits)
            best_LTK = scores_LTE.topk(most + 1).values
            wavers_LT = best_LTK[..., -2] - best_LTK[..., -1] < WAVERING * scores_LTE.std()
            wavering = wavers_LT.any(0).nonzero().flatten().tolist()
            if not wavering:
                break
            tokens[wavering[0]] = chooser.randrange(model.config.vocab_size)
