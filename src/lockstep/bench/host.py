"""What a decode step costs the host: everything of a step but the device's own work.

The model is one that computes nothing, so that what is left is the scheduler, inputs, page tables, the readback of
tokens, results, events and their encoding for the client's process. All of it is one thread's work. Torch gets no
other: threads that wait for each other over a few hundred numbers would be all that is measured.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lockstep.attention.paged_backend import PagedBackend
from lockstep.attention.table_parts import DecodeTables, ExtendTables
from lockstep.bench.figures import percentile
from lockstep.bench.fingerprint import fingerprint
from lockstep.bench.report import Report, shown
from lockstep.core.request import Request
from lockstep.core.sampling import SamplingParams
from lockstep.core.step import Executor, Pending
from lockstep.engine.messages import Sequences, encode
from lockstep.executor.runner import ModelRunner
from lockstep.executor.transfers import Transfers
from lockstep.kv.pool.pool import KVPool
from lockstep.layers.build import Build, ForwardContext
from lockstep.layers.tokens import Tokens
from lockstep.models.llm.decoder import DecoderConfig, DecoderModel
from lockstep.ops.registry import kernels
from lockstep.scheduler.limits import SchedulerLimits
from lockstep.scheduler.scheduler import Scheduler

PARTS = ("plan", "inputs and submission", "result", "update", "encoded events")
PAGE_SIZE = 16
CONTEXT_LENGTH = 8192


class IdleModel(DecoderModel):
    """Scores that are all the same, from rows that are zeros."""

    architectures = ()

    def __init__(self, vocab_size: int = 16) -> None:
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        self.config = DecoderConfig.parse({**dict.fromkeys(sizes, 1), "vocab_size": vocab_size})

    @classmethod
    def make(cls, build: Build, config: Mapping[str, Any]) -> DecoderModel:
        return cls(config["vocab_size"])

    def forward(self, ctx: ForwardContext, tokens: Tokens) -> torch.Tensor:
        return torch.zeros(len(tokens), 1)

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(hidden_RD), self.config.vocab_size)


@dataclass
class HostCost:
    """Milliseconds that each part of a step of `num_requests` decoding sequences took, one value a step."""

    num_requests: int
    parts_ms: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})

    @property
    def steps_ms(self) -> list[float]:
        """The parts together."""
        return [sum(parts) for parts in zip(*self.parts_ms.values(), strict=True)]

    def percentiles(self) -> dict[str, dict[str, float]]:
        """p50 and p99 of every part and of the whole step."""
        values = {**self.parts_ms, "whole step": self.steps_ms}
        return {name: {"p50": percentile(ms, 50), "p99": percentile(ms, 99)} for name, ms in values.items()}


def main(*, num_requests: Sequence[int], prompt_tokens: int, num_steps: int, json_out: Path | None) -> int:
    """Measures, prints and returns the exit code."""
    machine = fingerprint()
    with _one_thread():
        found = {
            count: measure(count, prompt_tokens=prompt_tokens, num_steps=num_steps).percentiles()
            for count in num_requests
        }
    names = (*PARTS, "whole step")
    Report(
        benchmark="host",
        machine=machine,
        model={"name": "a model that computes nothing"},
        workload={"prompt_tokens": prompt_tokens, "steps": num_steps},
        columns=["ms, p50 (p99)", *(f"{count} requests" for count in num_requests)],
        rows=[[name, *(_shown(found[count][name]) for count in num_requests)] for name in names],
        results={"ms": {str(count): figures for count, figures in found.items()}},
    ).publish(json_out)
    return 0


def measure(num_requests: int, *, prompt_tokens: int, num_steps: int) -> HostCost:
    """`num_steps` steps in which every request decodes, each planned while the one before it is in flight."""
    scheduler, executor = _engine(num_requests)
    for number in range(num_requests):
        prompt = tuple((number + at) % 16 for at in range(prompt_tokens))
        params = SamplingParams(temperature=0.0, seed=0)
        scheduler.add(Request(request_id=f"request-{number}", prompt_token_ids=prompt, params=params))
    cost, pending = HostCost(num_requests), deque[Pending]()
    while len(cost.steps_ms) < num_steps:
        marks_s = [time.perf_counter()]
        plan = scheduler.plan()
        assert plan is not None
        marks_s.append(time.perf_counter())
        pending.append(executor.submit(plan))
        marks_s.append(time.perf_counter())
        if len(pending) == 1:
            continue
        result = pending.popleft().result()
        marks_s.append(time.perf_counter())
        events = scheduler.update(result)
        marks_s.append(time.perf_counter())
        encode(Sequences(events))
        marks_s.append(time.perf_counter())
        if len(events) == plan.num_tokens == num_requests:
            for part, begin_s, end_s in zip(PARTS, marks_s[:-1], marks_s[1:], strict=True):
                cost.parts_ms[part].append((end_s - begin_s) * 1e3)
    return cost


def _engine(num_requests: int) -> tuple[Scheduler, Executor]:
    num_pages = num_requests * CONTEXT_LENGTH // PAGE_SIZE
    limits = SchedulerLimits(
        max_running_requests=num_requests,
        chunk_tokens=CONTEXT_LENGTH,
        max_queued_requests=num_requests,
        context_length=CONTEXT_LENGTH,
        page_size=PAGE_SIZE,
        num_pages=num_pages,
        max_plans_in_flight=2,
    )
    decode, extend = (kernels(op)[0] for op in ("attention_decode", "attention_extend"))
    runner = ModelRunner(
        IdleModel(),
        KVPool((), num_pages=num_pages, page_size=PAGE_SIZE, dtype=torch.float32, allocate=_zeros),
        PagedBackend(DecodeTables(decode), ExtendTables(extend)),
        max_sequences=num_requests,
        windows=(),
        eos_token_ids=(),
        transfers=Transfers(torch.zeros(()).device),
    )
    return Scheduler(limits), runner


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Inside, torch computes on the calling thread alone."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _shown(figures: Mapping[str, float]) -> str:
    return f"{shown(figures['p50'])} ({shown(figures['p99'])})"
