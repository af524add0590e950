"""Small models of every architecture, built over any mesh and run for one step with no engine around them.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lockstep.attention.backend import AttentionBackend, Span
from lockstep.attention.torch_backend import TorchBackend
from lockstep.kv.pool.pool import KVPool
from lockstep.layers.build import Build, ForwardContext, Slice, Weights
from lockstep.layers.tokens import Tokens
from lockstep.models.llm.decoder import DecoderModel
from lockstep.models.registry import model_class
from lockstep.ops.selection import KernelSelector
from lockstep.parallel.mesh import Mesh
from lockstep.platforms.base import Platform
from lockstep.platforms.cpu import CpuPlatform
from lockstep.platforms.null import NullPlatform

PAGE_SIZE = 4
CONTEXT_LENGTH = 32


@dataclass(frozen=True)
class Layout:
    """A model's config.json, and the sizes of the tensor-parallel axis that can hold it."""

    name: str
    architecture: str
    valid_tp: tuple[int, ...]
    invalid_tp: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """Sizes that no power of two divides, so that a wrong share shows."""
        return {
            "architectures": [self.architecture],
            "hidden_size": 36,
            "intermediate_size": 50,
            "num_hidden_layers": 2,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": 8,
            "vocab_size": 101,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": CONTEXT_LENGTH,
            **self.settings,
        }


SLIDES = ["sliding_attention", "full_attention"]

LAYOUTS = (
    Layout("llama", "LlamaForCausalLM", (1, 2, 3, 9), (4, 5, 6, 8, 12), 9, 3),
    Layout(
        "llama with biases, tied",
        "LlamaForCausalLM",
        (1, 2, 4),
        (3, 5, 8),
        4,
        2,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    Layout("qwen2", "Qwen2ForCausalLM", (1, 2, 4, 8), (3, 5, 6, 7, 16), 8, 2, {"tie_word_embeddings": True}),
    Layout(
        "qwen2, sliding",
        "Qwen2ForCausalLM",
        (1, 2, 3, 6),
        (4, 5, 9),
        6,
        3,
        {"use_sliding_window": True, "sliding_window": 3, "layer_types": SLIDES},
    ),
    Layout("qwen3", "Qwen3ForCausalLM", (1, 2, 3, 4), (5, 8), 4, 4),
    Layout("qwen3 with biases", "Qwen3ForCausalLM", (1, 2, 4), (3, 8), 4, 2, {"attention_bias": True}),
    Layout(
        "gemma3",
        "Gemma3ForCausalLM",
        (1, 2, 3, 6),
        (4, 5, 12),
        6,
        1,
        {"sliding_window": 3, "layer_types": SLIDES, "attention_bias": True, "query_pre_attn_scalar": 16},
    ),
    Layout(
        "gemma3, untied",
        "Gemma3ForCausalLM",
        (1, 2, 3, 4, 5),
        (6, 8),
        5,
        5,
        {"sliding_window": 3, "tie_word_embeddings": False, "final_logit_softcapping": 3.0},
    ),
    Layout(
        "qwen3 with experts",
        "Qwen3MoeForCausalLM",
        (1, 2, 4),
        (3, 5, 8),
        4,
        2,
        {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 14, "mlp_only_layers": [0]},
    ),
)


class SeededWeights:
    """Normal values that depend on the name alone, of a size that makes every weight matter.

    `noisy` names a weight that is a few percent off, to see whether the logits notice.
    """

    def __init__(self, noisy: str = "") -> None:
        self._noisy = noisy
        self.names: list[str] = []

    def load(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, part: Slice | None) -> torch.Tensor:
        self.names.append(name)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(shape, generator=generator)
        if name == self._noisy:
            values += 0.05 * torch.randn(shape, generator=generator)
        values *= 0.5 if len(shape) == 1 else shape[-1] ** -0.5
        if name.endswith("norm.weight"):
            values += 1
        if part is not None:
            values = values.narrow(part.dim, part.start, part.length)
        return values.to(dtype).contiguous()

    def load_grouped(self, name: str, shape: tuple[int, ...], part: Slice | None) -> None:
        """Drawn values are plain ones."""


def build_over(
    mesh: Mesh, weights: Weights, *, meta: bool = False, dtype: torch.dtype = torch.float32
) -> Build:
    """What layers are made from: on the meta device with no values, or on the processor as the engine would."""
    platform: Platform = NullPlatform() if meta else CpuPlatform()
    preference = ("torch",) if meta else platform.kernel_preference
    return Build(
        mesh=mesh,
        device=platform.device(),
        dtype=dtype,
        kv_dtype=dtype,
        weights=weights,
        kernels=KernelSelector(platform.capabilities(), preference),
        context_length=CONTEXT_LENGTH,
        page_size=PAGE_SIZE,
    )


class TinyModel:
    """A model, its KV pool and what a step needs."""

    def __init__(self, build: Build, config: Mapping[str, Any]) -> None:
        self.build = build
        self.model: DecoderModel = model_class(config).make(build, config)
        self._backend: AttentionBackend = TorchBackend()
        self._pool = KVPool(
            tuple(build.kv_layers),
            num_pages=16,
            page_size=PAGE_SIZE,
            dtype=build.kv_dtype,
            allocate=lambda shape, dtype: torch.zeros(shape, dtype=dtype, device=build.device),
        )

    def step(
        self, spans: Sequence[Span], wanted: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden rows and logits [T, V] of new tokens, or of the wanted ones of these rows [R, V].

        Each token's id follows from its page and position.
        """
        rows = [(span, at) for span in spans for at in range(span.start, span.start + span.num_tokens)]
        slots = [span.page_ids[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE for span, at in rows]
        token_ids = [(7 * slot + 3) % self.model.config.vocab_size for slot in slots]
        token_ids_T, positions_T, slots_T = (
            torch.tensor(values, dtype=torch.int64, device=self.build.device)
            for values in (token_ids, [at for _, at in rows], slots)
        )
        plan = self._backend.plan(
            spans, page_size=PAGE_SIZE, windows=self.build.windows, device=self.build.device
        )
        wanted_R = None if wanted is None else torch.tensor(wanted, device=self.build.device)
        ctx = ForwardContext(positions_T, slots_T, self._backend, plan, self._pool, wanted_R)
        hidden_TD = self.model.forward(ctx, Tokens(token_ids_T))
        return hidden_TD, self.model.logits(hidden_TD)

    def logits(self) -> torch.Tensor:
        """Logits of two sequences: of prompts, a chunk beside a single token, single tokens, then of the last rows of
        two longer spans alone."""
        first, second = (5, 0, 9), (2, 11, 12)
        steps = (
            [Span(0, 7, first), Span(0, 3, second)],
            [Span(3, 4, second), Span(7, 1, first)],
            [Span(8, 1, first), Span(7, 1, second)],
        )
        with torch.inference_mode():
            of_all = [self.step(spans)[1] for spans in steps]
            of_last = self.step([Span(9, 2, first), Span(8, 4, second)], wanted=(1, 5))[1]
        return torch.cat([*of_all, of_last])
