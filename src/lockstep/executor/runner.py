"""Runs steps of one model on one rank.

Shapes: T rows of the step, B slices, R rows whose hidden state is read, D model, V vocabulary, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lockstep.attention.backend import AttentionBackend
from lockstep.core.errors import InvalidRequest
from lockstep.core.probe import Probe
from lockstep.core.step import Landed, Pending, StepPlan, StepResult, TokenSlice
from lockstep.executor.computed import Computed
from lockstep.executor.graphs import StepGraphs
from lockstep.executor.hooks import SamplerHook
from lockstep.executor.inputs import LastTokens, StepInputs, StepRows, build_inputs, pays_to_select
from lockstep.executor.logprobs import ScoredTokens, score_prompt, score_tokens
from lockstep.executor.pending import Findings, PendingStep
from lockstep.executor.sampler import STOCK, Sampler, Sampling, SamplingKernels
from lockstep.executor.sequences import SequenceState, SequenceTable
from lockstep.executor.threads import ThreadGovernor
from lockstep.executor.transfers import Transfers
from lockstep.kv.pool.pool import KVPool
from lockstep.layers.build import ForwardContext
from lockstep.models.llm.decoder import DecoderModel


class ModelRunner:
    """The model, its KV pool and its sequences; `submit` is one step.

    Owns the token ids and page tables of running sequences; follows plans and takes no decision of its own. What a
    step samples stays on the device for the next one, which may so be submitted before the host knows it.

    `wants_all`: every row of a step goes through the whole model, not only those that are read; so with a probe, too.
    """

    def __init__(
        self,
        model: DecoderModel,
        pool: KVPool,
        attention: AttentionBackend,
        *,
        max_sequences: int,
        windows: Sequence[int],
        eos_token_ids: Sequence[int],
        transfers: Transfers,
        sampling: SamplingKernels = STOCK,
        hooks: Sequence[SamplerHook] = (),
        probe: Probe | None = None,
        governor: ThreadGovernor | None = None,
        graphs: StepGraphs | None = None,
        wants_all: bool = False,
    ) -> None:
        self._model = model
        self._pool = pool
        self._attention = attention
        self._windows = tuple(windows)
        self._transfers = transfers
        self._hooks = tuple(hooks)
        self._probe = probe
        self._governor = governor
        self._graphs = graphs
        self._wants_all = wants_all or probe is not None
        self._sampler = Sampler(
            max_sequences, model.config.vocab_size, eos_token_ids, transfers, hooks, sampling
        )
        self._sequences = SequenceTable(max_sequences)
        self._last_tokens = (
            LastTokens(max_sequences, transfers.device) if graphs is None else graphs.last_tokens
        )

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> Pending:
        """Has the plan's slices computed and their next tokens chosen. See Executor."""
        self._transfers.begin_step()
        self._follow(plan)
        if not plan.slices:
            self._transfers.end_step()
            return Landed(StepResult(plan.step_id))
        if self._governor is None:
            return self._compute(plan)
        with self._governor.step():
            return self._compute(plan)

    @torch.inference_mode()
    def record_next(self) -> bool:
        """Records one more size of step as a graph; False when all are there. See Executor."""
        return self._graphs is not None and self._graphs.record_next()

    def execute(self, plan: StepPlan) -> StepResult:
        """One step, waited for."""
        return self.submit(plan).result()

    def _follow(self, plan: StepPlan) -> None:
        for slot in self._sequences.apply(plan):
            self._sampler.end(slot)
        for start in plan.started:
            self._sampler.start(self._sequences[start.seq_id].slot, start)
        for hook in self._hooks:
            for seq_id in plan.ended:
                hook.end(seq_id)
            for start in plan.started:
                try:
                    hook.start(start.seq_id, start)
                except InvalidRequest as error:
                    self._sequences.fail(start.seq_id, str(error))

    def _compute(self, plan: StepPlan) -> PendingStep:
        num_graph_rows = self._graphs.num_rows_for(plan) if self._graphs is not None else None
        inputs = build_inputs(
            plan,
            self._sequences,
            self._pool.page_size,
            num_rows=num_graph_rows,
            stager=self._transfers,
            wants_all=self._wants_all,
        )
        if self._probe is not None:
            rows = [(piece.seq_id, piece.start + at) for piece in plan.slices for at in range(piece.num_tokens)]
            self._probe.begin_step(plan.step_id, tuple(rows))
        if self._graphs is not None and num_graph_rows is not None:
            computed = self._graphs.compute(inputs)
        else:
            computed = self._forward(inputs)
        findings = self._find(plan, inputs, computed)
        return PendingStep(plan, findings, self._hooks, self._transfers.end_step())

    def _forward(self, inputs: StepInputs) -> Computed:
        rows = StepRows(self._transfers.upload(inputs.memory), inputs.num_rows)
        plan = self._attention.plan(
            inputs.spans,
            page_size=self._pool.page_size,
            windows=self._windows,
            device=self._transfers.device,
        )
        wanted_R = self._few_wanted(inputs)
        context = ForwardContext(rows.positions_T, rows.slots_T, self._attention, plan, self._pool, wanted_R)
        hidden_RD = self._model.forward(context, self._last_tokens.of(rows))
        return Computed(rows, hidden_RD, wanted_R=wanted_R)

    def _few_wanted(self, inputs: StepInputs) -> torch.Tensor | None:
        """The rows [R] that are wanted of a step with longer spans, if they are few; None for all."""
        wanted_row_R = inputs.wanted_row_R if inputs.num_rows > len(inputs.spans) else None
        if wanted_row_R is None or not pays_to_select(len(wanted_row_R), inputs.num_rows):
            return None
        return self._transfers.upload(wanted_row_R)

    def _find(self, plan: StepPlan, inputs: StepInputs, computed: Computed) -> Findings:
        findings = Findings()
        samples_B = inputs.samples_B.copy()
        for index in np.nonzero(self._sequences.is_special_S[inputs.owner_B])[0].tolist():
            piece, first = plan.slices[index], int(inputs.first_row_B[index])
            state = self._sequences[piece.seq_id]
            if state.error is not None:
                findings.errors[index] = state.error
                samples_B[index] = False
            else:
                assert computed.wanted_R is None, "rows are found by their numbers in the step here"
                rows_TD = computed.hidden_RD[first : first + piece.num_tokens]
                self._find_more(findings, index, state, piece, rows_TD)
        sampled = np.nonzero(samples_B)[0]
        if len(sampled):
            self._sample(findings, sampled, plan, inputs, computed)
        return findings

    def _find_more(
        self, findings: Findings, index: int, state: SequenceState, piece: TokenSlice, rows_TD: torch.Tensor
    ) -> None:
        """What is asked of a sequence beyond its next token."""
        scores = self._score_prompt(state, piece, rows_TD)
        if scores:
            findings.prompt_logprobs[index] = scores
        if state.pooling is not None:
            unit_D = _pool_rows(state, piece, rows_TD)
            if unit_D is not None:
                findings.embeddings[index] = self._transfers.download(unit_D)

    def _score_prompt(
        self, state: SequenceState, piece: TokenSlice, rows_TD: torch.Tensor
    ) -> list[ScoredTokens]:
        num_top = state.params.prompt_logprobs
        end = min(piece.start + piece.num_tokens, state.num_prompt_tokens - 1)
        if num_top is None or end <= piece.start:
            return []
        next_token_ids_T = self._transfers.upload(state.token_ids[piece.start + 1 : end + 1])
        rows_TD = rows_TD[: end - piece.start]
        return score_prompt(rows_TD, self._model.logits, next_token_ids_T, num_top, self._transfers)

    def _sample(
        self, findings: Findings, sampled: np.ndarray, plan: StepPlan, inputs: StepInputs, computed: Computed
    ) -> None:
        """Chooses tokens for these slices, leaves them where the next step looks for them, and sends them home."""
        findings.sampled = sampled.tolist()
        seq_ids = [plan.slices[index].seq_id for index in findings.sampled]
        slot_R = inputs.owner_B[sampled]
        sampling = Sampling(seq_ids, slot_R, inputs.spans.num_keys_B[sampled])
        scored = np.nonzero(self._sequences.is_scored_S[slot_R])[0]
        is_whole = len(sampled) == inputs.num_rows
        if is_whole and computed.choice is not None and not len(scored) and self._sampler.is_bare(sampling):
            findings.chosen = self._transfers.fetch(computed.choice.replay())
            return
        owners_R, logits_RV = self._score(inputs, computed, sampled)
        # Log-probabilities are of the model's own distribution, before the sampler edits the scores.
        untouched_RV = logits_RV[self._transfers.upload(scored)] if len(scored) else None
        chosen = self._sampler.choose(logits_RV, sampling)
        self._last_tokens.keep(owners_R, chosen.token_ids_R)
        findings.chosen = self._transfers.fetch(chosen.packed())
        if untouched_RV is not None:
            token_ids = chosen.token_ids_R[self._transfers.upload(scored)]
            findings.scored = scored.tolist()
            num_top = [self._sequences[seq_ids[row]].params.logprobs or 0 for row in findings.scored]
            findings.logprobs = score_tokens(untouched_RV, token_ids, num_top, self._transfers)

    def _score(
        self, inputs: StepInputs, computed: Computed, sampled: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The owners [R] and the scores [R, V] of the last rows of these slices."""
        owners_T, hidden_RD = computed.rows.owners_T, computed.hidden_RD
        count = len(sampled)
        if computed.wanted_R is not None:
            # Rows were left out: these are the slices that sample, in the order of the wanted rows.
            return owners_T.index_select(0, computed.wanted_R[:count]), self._model.logits(hidden_RD[:count])
        if count < inputs.num_rows:
            row_R = self._transfers.upload(inputs.last_row_B[sampled])
            return owners_T.index_select(0, row_R), self._model.logits(hidden_RD.index_select(0, row_R))
        if computed.scores is not None:
            return owners_T[:count], computed.scores.replay()[:count]
        return owners_T[:count], self._model.logits(hidden_RD[:count])


def _pool_rows(state: SequenceState, piece: TokenSlice, rows_TD: torch.Tensor) -> torch.Tensor | None:
    """Mean or last hidden row of a prompt, scaled to length one, once its last slice is computed."""
    if state.pooling == "mean":
        total = rows_TD.float().sum(0)
        state.hidden_sum_D = total if state.hidden_sum_D is None else state.hidden_sum_D + total
    if piece.start + piece.num_tokens < state.num_prompt_tokens:
        return None
    vector_D = (
        rows_TD[-1].float() if state.hidden_sum_D is None else state.hidden_sum_D / state.num_prompt_tokens
    )
    return torch.nn.functional.normalize(vector_D, dim=0)
