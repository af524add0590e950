"""Runs steps of one model on one rank.

Shapes: T rows of the step, R rows that sample, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch

from lockstep.attention.backend import AttentionBackend
from lockstep.core.errors import InvalidRequest
from lockstep.core.probe import Probe
from lockstep.core.step import SequenceResult, StepPlan, StepResult, TokenLogprob, TokenSlice
from lockstep.executor.graphs import DecodeGraphs
from lockstep.executor.hooks import SamplerHook
from lockstep.executor.inputs import StepInputs, build_inputs
from lockstep.executor.logprobs import prompt_logprobs, token_logprobs
from lockstep.executor.sampler import Sample, Sampler
from lockstep.executor.sequences import SequenceState, SequenceTable
from lockstep.executor.threads import ThreadGovernor
from lockstep.kv.pool.pool import KVPool
from lockstep.layers.build import ForwardContext
from lockstep.models.llm.decoder import DecoderModel


class Executor(Protocol):
    """Whoever answers plans: a model, or the null platform's counter."""

    def execute(self, plan: StepPlan) -> StepResult: ...


class ModelRunner:
    """The model, its KV pool and its sequences; `execute` is one step.

    Owns the token ids and page tables of running sequences; follows plans and takes no decision of its own.
    """

    def __init__(
        self,
        model: DecoderModel,
        pool: KVPool,
        attention: AttentionBackend,
        *,
        windows: Sequence[int],
        eos_token_ids: Sequence[int],
        device: torch.device,
        sample: Sample,
        hooks: Sequence[SamplerHook] = (),
        probe: Probe | None = None,
        governor: ThreadGovernor | None = None,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self._model = model
        self._pool = pool
        self._attention = attention
        self._windows = tuple(windows)
        self._device = device
        self._hooks = tuple(hooks)
        self._probe = probe
        self._governor = governor
        self._graphs = graphs
        self._sampler = Sampler(eos_token_ids, hooks, sample)
        self._sequences = SequenceTable()

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Compute the plan's slices and choose the next tokens."""
        self._follow(plan)
        if not plan.slices:
            return StepResult(plan.step_id)
        if self._governor is None:
            return self._compute(plan)
        with self._governor.step():
            return self._compute(plan)

    def _compute(self, plan: StepPlan) -> StepResult:
        num_graph_rows = self._graphs.num_rows_for(plan) if self._graphs is not None else None
        inputs = build_inputs(
            plan, self._sequences, self._pool.page_size, self._device, num_rows=num_graph_rows
        )
        if self._probe is not None:
            rows = [(piece.seq_id, piece.start + at) for piece in plan.slices for at in range(piece.num_tokens)]
            self._probe.begin_step(plan.step_id, tuple(rows))
        if self._graphs is not None and num_graph_rows is not None:
            hidden_TD = self._graphs.compute(inputs)
        else:
            hidden_TD = self._model.forward(self._context(inputs), inputs.token_ids_T)
        return self._answer(plan, inputs, hidden_TD)

    def _follow(self, plan: StepPlan) -> None:
        self._sequences.apply(plan)
        for hook in self._hooks:
            for seq_id in plan.ended:
                hook.end(seq_id)
            for start in plan.started:
                try:
                    hook.start(start.seq_id, start)
                except InvalidRequest as error:
                    self._sequences[start.seq_id].error = str(error)

    def _context(self, inputs: StepInputs) -> ForwardContext:
        plan = self._attention.plan(
            inputs.spans, page_size=self._pool.page_size, windows=self._windows, device=self._device
        )
        return ForwardContext(inputs.positions_T, inputs.slots_T, self._attention, plan, self._pool)

    def _answer(self, plan: StepPlan, inputs: StepInputs, hidden_TD: torch.Tensor) -> StepResult:
        results: dict[int, SequenceResult] = {}
        sampling: list[tuple[SequenceState, int]] = []
        for piece, first_row in zip(plan.slices, inputs.first_rows, strict=True):
            state = self._sequences[piece.seq_id]
            rows_TD = hidden_TD[first_row : first_row + piece.num_tokens]
            scores = self._score_prompt(state, piece, rows_TD)
            results[piece.seq_id] = SequenceResult(piece.seq_id, prompt_logprobs=scores)
            if state.error is not None:
                results[piece.seq_id] = SequenceResult(piece.seq_id, error=state.error)
            elif state.pooling is not None:
                results[piece.seq_id] = _pool_rows(state, piece, rows_TD)
            elif piece.samples:
                sampling.append((state, first_row + piece.num_tokens - 1))
        for result in self._sample(sampling, hidden_TD) if sampling else ():
            scores = results[result.seq_id].prompt_logprobs
            results[result.seq_id] = replace(result, prompt_logprobs=scores) if scores else result
        return StepResult(plan.step_id, tuple(results[piece.seq_id] for piece in plan.slices))

    def _score_prompt(
        self, state: SequenceState, piece: TokenSlice, rows_TD: torch.Tensor
    ) -> tuple[TokenLogprob, ...]:
        num_top = state.params.prompt_logprobs
        end = min(piece.start + piece.num_tokens, state.num_prompt_tokens - 1)
        if num_top is None or end <= piece.start:
            return ()
        next_token_ids = state.token_ids[piece.start + 1 : end + 1]
        return tuple(prompt_logprobs(rows_TD, self._model.logits, next_token_ids, num_top))

    def _sample(
        self, sampling: list[tuple[SequenceState, int]], hidden_TD: torch.Tensor
    ) -> list[SequenceResult]:
        states = [state for state, _ in sampling]
        rows = [row for _, row in sampling]
        whole = len(rows) == hidden_TD.shape[0]
        logits_RV = self._model.logits(hidden_TD if whole else hidden_TD[rows])
        scored = [row for row, state in enumerate(states) if state.params.logprobs is not None]
        # Log-probabilities are of the model's own distribution, before the sampler edits the scores.
        untouched_RV = logits_RV[scored] if scored else None
        choices = self._sampler.choose(logits_RV, states)
        logprobs: dict[int, TokenLogprob] = {}
        if untouched_RV is not None:
            chosen = [choices[row].token_id for row in scored]
            num_top = [states[row].params.logprobs or 0 for row in scored]
            logprobs = dict(zip(scored, token_logprobs(untouched_RV, chosen, num_top), strict=True))
        results = []
        for row, (state, choice) in enumerate(zip(states, choices, strict=True)):
            if choice.error is not None:
                results.append(SequenceResult(state.seq_id, error=choice.error))
                continue
            state.append(choice.token_id)
            try:
                complete = any([hook.accept(state.seq_id, choice.token_id) for hook in self._hooks])
            except InvalidRequest as error:
                results.append(SequenceResult(state.seq_id, error=str(error)))
                continue
            results.append(
                SequenceResult(
                    state.seq_id,
                    token_ids=(choice.token_id,),
                    logprobs=(logprobs[row],) if row in logprobs else (),
                    complete=complete,
                )
            )
        return results


def _pool_rows(state: SequenceState, piece: TokenSlice, rows_TD: torch.Tensor) -> SequenceResult:
    """Mean or last hidden row of a prompt, scaled to length one, once its last slice is computed."""
    if state.pooling == "mean":
        total = rows_TD.float().sum(0)
        state.hidden_sum_D = total if state.hidden_sum_D is None else state.hidden_sum_D + total
    if piece.start + piece.num_tokens < state.num_prompt_tokens:
        return SequenceResult(piece.seq_id)
    vector_D = (
        rows_TD[-1].float() if state.hidden_sum_D is None else state.hidden_sum_D / state.num_prompt_tokens
    )
    unit_D = torch.nn.functional.normalize(vector_D, dim=0)
    return SequenceResult(piece.seq_id, embedding=tuple(unit_D.tolist()))
