"""Hugging Face transformers as a contender: the same weights, dequantised, on the same device and threads."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lockstep.bench.contender import Round
from lockstep.bench.workload import Job
from lockstep.core.errors import ConfigError
from lockstep.engine.model_files import open_tokenizer
from lockstep.engine.opening import OpenedModel, open_for_running
from lockstep.models.loading.weights import FileWeights
from lockstep.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

MISSING = "comparing needs transformers: pip install 'lockstep-engine[bench]'"


class TransformersContender:
    """`generate` on one padded batch, greedy, with its KV cache, `sdpa` attention and Lockstep's dtype.

    `options` are those of LLM. Raises ConfigError without transformers, and what opening a model raises.
    """

    name = "transformers"
    caches_prefixes = False

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._opened = open_for_running(options)
        self.card = self._opened.card
        self._opened.platform.set_num_threads(self._opened.config.device.threads)
        self._model: Any = load_model(self._opened)

    def run(self, jobs: Sequence[Job], *, fresh: bool = True) -> Round:
        """Pads on the left; generates as long as the longest job wants and counts what each job wanted."""
        import torch
        from transformers import GenerationConfig, StoppingCriteriaList

        prompts = [self._token_ids(job) for job in jobs]
        wanted = [job.max_tokens for job in jobs]
        synchronize = self._opened.platform.synchronize
        begin_s = time.perf_counter()
        ids, mask = _padded(prompts, self._opened.platform.device(0))
        watch = _StepWatch(synchronize)
        with torch.inference_mode():
            answers = self._model.generate(
                ids,
                attention_mask=mask,
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=max(wanted),
                    use_cache=True,
                    pad_token_id=0,
                ),
                stopping_criteria=StoppingCriteriaList([watch]),
            )
        first_token_ids = answers[:, ids.shape[1]].tolist()
        seconds = time.perf_counter() - begin_s
        trace = [
            (at_s - begin_s, sum(min(step, most) for most in wanted))
            for step, at_s in enumerate(watch.times_s, start=1)
        ]
        return Round(
            num_prompt_tokens=sum(map(len, prompts)),
            num_output_tokens=trace[-1][1],
            num_steps=len(trace),
            seconds=seconds,
            trace=tuple(trace),
            first_token_s=(trace[0][0],) * len(jobs),
            first_token_ids=tuple(first_token_ids),
        )

    def close(self) -> None:
        self._model = None

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return open_tokenizer(self._opened.files, self._opened.config.model.tokenizer, None)

    def _token_ids(self, job: Job) -> Sequence[int]:
        return self._tokenizer.encode(job.prompt) if isinstance(job.prompt, str) else job.prompt


def load_model(opened: OpenedModel) -> Any:
    """The causal model of transformers with the values that Lockstep reads from the files, each as `dtype`.

    Raises ConfigError when transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise ConfigError(MISSING) from None
    import torch

    settings = dict(opened.files.config)
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    dtype = getattr(torch, opened.config.model.dtype)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    weights = FileWeights(opened.files)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.load(name, dtype))
    # Without an end token it neither stops early nor spends time on looking for one. Here, because `generate`
    # takes from the model whatever its own configuration leaves open.
    model.generation_config.eos_token_id = None
    return model.eval().to(opened.platform.device(0))


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both [prompts, longest prompt], padded on the left with zeros."""
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask


class _StepWatch:
    """A stopping criterion that never stops, and notes when it was asked: after each step."""

    def __init__(self, synchronize: Any) -> None:
        self._synchronize = synchronize
        self.times_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._synchronize()
        self.times_s.append(time.perf_counter())
        return input_ids.new_zeros(input_ids.shape[0]).bool()
