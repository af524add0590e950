"""What the sampler chooses, against plain float64 arithmetic written out here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.core.sampling import SamplingParams
from lockstep.core.step import SequenceStart
from lockstep.executor.draws import uniforms
from lockstep.executor.hooks import SamplerHook
from lockstep.executor.sampler import STOCK, Sampler, Sampling, SamplingKernels, explain
from lockstep.executor.transfers import Transfers
from lockstep.ops.top_k_top_p_sample.kernels.torch import FIRST_CANDIDATES
from lockstep.ops.top_k_top_p_sample.reference import top_k_top_p_sample

pytestmark = pytest.mark.suite("cpu")

EOS = 3
PROMPT = (5, 6, 7, 7)
VOCAB_SIZE = 97


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def state_of(
    params: SamplingParams, generated: Sequence[int] = (), prompt: Sequence[int] = PROMPT, seq_id: int = 0
) -> SequenceStart:
    return SequenceStart(seq_id, params, (*prompt, *generated), len(prompt), 0, ())


class Rows:
    """A sampler with a sequence in each row."""

    def __init__(
        self,
        vocab_size: int,
        starts: Sequence[SequenceStart],
        eos: Sequence[int] = (EOS,),
        hooks: Sequence[SamplerHook] = (),
        kernels: SamplingKernels = STOCK,
    ) -> None:
        self._sampler = Sampler(len(starts), vocab_size, eos, Transfers(torch.device("cpu")), hooks, kernels)
        # Slots in another order than rows.
        self._slots = np.array([len(starts) - row for row in range(len(starts))])
        self._seq_ids = [start.seq_id for start in starts]
        self._positions = np.array([len(start.token_ids) for start in starts])
        for slot, start in zip(self._slots.tolist(), starts, strict=True):
            self._sampler.start(slot, start)

    def choose(self, logits_RV: torch.Tensor) -> tuple[list[int], list[str | None]]:
        """The next token of each row, and why there is none."""
        chosen = self._sampler.choose(logits_RV, Sampling(self._seq_ids, self._slots, self._positions))
        self._positions = self._positions + 1
        return chosen.token_ids_R.tolist(), [explain(best) for best in chosen.best_R.tolist()]


def draw_of(state: SequenceStart) -> float:
    """The random number that decides the next token."""
    seeds = np.array([state.params.seed or 0], dtype=np.uint64)
    return float(uniforms(seeds, np.array([len(state.token_ids)]))[0])


def random_logits(seed: int, vocab_size: int = VOCAB_SIZE, scale: float = 3.0) -> torch.Tensor:
    print(f"logits seed {seed}")
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def choose(logits_V: torch.Tensor, *states: SequenceStart, eos: Sequence[int] = (EOS,)) -> list[int]:
    """Tokens for rows that all have the same scores."""
    token_ids, errors = Rows(len(logits_V), states, eos).choose(logits_V.repeat(len(states), 1))
    assert not any(errors)
    return token_ids


def edited(logits: np.ndarray, params: SamplingParams, generated: Sequence[int]) -> np.ndarray:
    """Penalties, bias and bans, one token at a time."""
    scores = logits.astype(np.float64)
    for token_id in set(PROMPT) | set(generated):
        if scores[token_id] > 0:
            scores[token_id] /= params.repetition_penalty
        else:
            scores[token_id] *= params.repetition_penalty
    for token_id in generated:
        scores[token_id] -= params.frequency_penalty
    for token_id in set(generated):
        scores[token_id] -= params.presence_penalty
    for token_id, bias in params.logit_bias.items():
        scores[token_id] += bias
    if len(generated) < params.min_tokens:
        scores[[EOS, *params.stop_token_ids]] = -np.inf
    return scores


def distribution(scores: np.ndarray, params: SamplingParams) -> list[tuple[int, float]]:
    """(token, probability) of every token that may be drawn, in the order of the running sum.

    Top-k, then the smallest set of the rest that holds top_p of it, then what has min_p of the best one's chance.
    Without filters the order is the vocabulary's, with them best first, equal ones by id.
    """
    weights = np.exp((scores - scores.max()) / params.temperature)
    weights /= weights.sum()
    if params.top_k <= 0 and params.top_p == 1.0 and params.min_p == 0.0:
        return list(enumerate(weights))
    order = sorted(range(len(weights)), key=lambda token_id: (-scores[token_id], token_id))
    if params.top_k > 0:
        order = order[: params.top_k]
        weights = weights / weights[order].sum()
    kept, mass = [], 0.0
    for token_id in order:
        if mass >= params.top_p:
            break
        kept.append(token_id)
        mass += weights[token_id]
    kept = [token_id for token_id in kept if weights[token_id] >= params.min_p * weights[order[0]]]
    total = weights[kept].sum()
    return [(token_id, weights[token_id] / total) for token_id in kept]


def assert_inverts(chosen: int, draw: float, ordered: list[tuple[int, float]], slack: float = 2e-6) -> None:
    """The draw lies in the chosen token's part of the running sum."""
    below = 0.0
    for token_id, probability in ordered:
        if token_id == chosen:
            assert below - slack <= draw <= below + probability + slack, (chosen, draw, below, probability)
            return
        below += probability
    raise AssertionError(f"token {chosen} was drawn, but the filters cut it")


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.4},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.3},
    {"top_p": 0.95, "temperature": 2.0},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.05, "temperature": 1.7},
    {"top_k": 5 * VOCAB_SIZE, "top_p": 0.9},
    {"top_k": VOCAB_SIZE, "min_p": 0.02},
]

EDITS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.2},
    {"frequency_penalty": 0.7},
    {"presence_penalty": -0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
    {"logit_bias": {0: 4.0, 7: -3.5, VOCAB_SIZE - 1: 1.0}},
    {"min_tokens": 6, "stop_token_ids": (11, 12)},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_draws_invert_the_filtered_distribution(options: dict[str, Any]) -> None:
    for seed in range(4):
        logits = random_logits(seed)
        states = [state_of(SamplingParams(seed=draw_seed, **options)) for draw_seed in range(150)]
        ordered = distribution(logits.numpy().astype(np.float64), states[0].params)
        for chosen, state in zip(choose(logits, *states), states, strict=True):
            assert_inverts(chosen, draw_of(state), ordered)


@pytest.mark.parametrize("filters", [{}, {"top_k": 9, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("options", EDITS, ids=str)
def test_edits_follow_the_formulas(options: dict[str, Any], filters: dict[str, Any]) -> None:
    generated = (9, 9, 9, 20, 7)
    for seed in range(3):
        logits = random_logits(seed)
        states = [state_of(SamplingParams(seed=each, **options, **filters), generated) for each in range(80)]
        scores = edited(logits.numpy(), states[0].params, generated)
        for chosen, state in zip(choose(logits, *states), states, strict=True):
            draw = draw_of(state)
            assert_inverts(chosen, draw, distribution(scores, state.params))
        greedy = state_of(SamplingParams(temperature=0.0, **options), generated)
        assert choose(logits, greedy) == [int(scores.argmax())]


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 6}, {"top_p": 0.7}, {"min_p": 0.2, "temperature": 1.5}], ids=str
)
def test_frequencies_are_the_probabilities(options: dict[str, Any]) -> None:
    """Chi-square over 20,000 seeds: says nothing about the order of the running sum, only about the chances."""
    logits, num_draws = random_logits(0, vocab_size=12, scale=1.0), 20_000
    probabilities = dict(distribution(logits.numpy().astype(np.float64), SamplingParams(**options)))
    counts: Counter[int] = Counter()
    for first in range(0, num_draws, 1000):
        states = [state_of(SamplingParams(seed=seed, **options), (4,)) for seed in range(first, first + 1000)]
        counts.update(choose(logits, *states))
    assert set(counts) <= set(probabilities)
    statistic = sum((counts[t] - num_draws * p) ** 2 / (num_draws * p) for t, p in probabilities.items())
    degrees = len(probabilities) - 1
    # Mean and variance of chi-square are k and 2k; the draws are fixed, so this never flickers.
    assert statistic < degrees + 4 * (2 * max(degrees, 1)) ** 0.5, (statistic, degrees)


@pytest.mark.parametrize("top_k", [0, 3, FIRST_CANDIDATES, FIRST_CANDIDATES + 40], ids=str)
def test_flat_scores_reach_the_whole_vocabulary(top_k: int) -> None:
    """More tokens survive than were sorted at first; with equal scores their order is by id."""
    vocab_size = 4 * FIRST_CANDIDATES + 5
    for logits in (torch.zeros(vocab_size), random_logits(1, vocab_size, scale=0.01)):
        states = [state_of(SamplingParams(seed=seed, top_k=top_k, top_p=0.999)) for seed in range(200)]
        ordered = distribution(logits.numpy().astype(np.float64), states[0].params)
        chosen = choose(logits, *states)
        for token_id, state in zip(chosen, states, strict=True):
            assert_inverts(token_id, draw_of(state), ordered)
        if top_k == 0:
            assert max(Counter(chosen).values()) < 10, "the draws do not spread"


def test_company_does_not_change_a_draw() -> None:
    """Alone, or among requests with other filters, orders and lengths; with scores as coarse as bfloat16's."""
    others = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_k=FIRST_CANDIDATES + 100),
        SamplingParams(seed=3, top_p=0.9999),
        SamplingParams(seed=4, logit_bias={1: 50.0}, min_p=0.5),
    ]
    vocab_size = 3 * FIRST_CANDIDATES
    for seed in range(6):
        logits = random_logits(seed, vocab_size, scale=1.5).bfloat16().float()
        for options in FILTERS:
            states = [state_of(SamplingParams(seed=each, **options)) for each in range(40)]
            alone = [choose(logits, state)[0] for state in states]
            assert choose(logits, *states) == alone
            company = [state_of(params, prompt=(1, 2, 3)) for params in others]
            assert choose(logits, *company, *states, *company)[5:-5] == alone


def test_a_kernel_that_does_not_ask_the_host_gets_every_row() -> None:
    """Greedy rows and rows without filters beside others, in one call: the same tokens as when they are kept apart."""
    calls: list[int] = []

    def sample(logits_RV: torch.Tensor, *limits: torch.Tensor) -> torch.Tensor:
        assert [limit.dtype for limit in limits] == [
            torch.float32,
            torch.int64,
            torch.float32,
            torch.float32,
            torch.float64,
        ]
        calls.append(len(logits_RV))
        return top_k_top_p_sample(logits_RV, *limits)

    on_device = SamplingKernels(STOCK.argmax, replace(STOCK.sample, function=sample, asks_host=False))
    kinds: list[dict[str, Any]] = [*FILTERS, {"temperature": 0.0}, {"temperature": 0.0, "top_k": 5}]
    for seed in range(8):
        states = [state_of(SamplingParams(seed=seed, **options)) for options in kinds]
        logits_RV = random_logits(seed, VOCAB_SIZE * len(states)).view(len(states), -1)
        found, errors = Rows(VOCAB_SIZE, states, kernels=on_device).choose(logits_RV.clone())
        assert (found, errors) == Rows(VOCAB_SIZE, states).choose(logits_RV)
    assert calls == [len(kinds)] * 8
    greedy = [state_of(SamplingParams(temperature=0.0)) for _ in range(3)]
    Rows(VOCAB_SIZE, greedy, kernels=on_device).choose(random_logits(0, 3 * VOCAB_SIZE).view(3, -1))
    assert len(calls) == 8, "greedy rows alone need no draw"


def test_equal_scores_are_kept_by_id() -> None:
    logits = torch.full((40,), -1.0)
    logits[[30, 10, 20, 5]] = 2.0
    states = [state_of(SamplingParams(seed=seed, top_k=2)) for seed in range(60)]
    assert set(choose(logits, *states)) == {5, 10}
    assert choose(logits, state_of(SamplingParams(temperature=0.0))) == [5]


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-6])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
def test_a_tiny_temperature_takes_the_best(temperature: float, options: dict[str, Any]) -> None:
    logits = random_logits(0, scale=30.0)
    states = [state_of(SamplingParams(seed=seed, temperature=temperature, **options)) for seed in range(20)]
    assert set(choose(logits, *states)) == {int(logits.argmax())}


def test_end_tokens_are_banned_until_min_tokens() -> None:
    logits = torch.zeros(VOCAB_SIZE)
    logits[EOS], logits[8] = 90.0, 80.0
    params = SamplingParams(temperature=0.0, min_tokens=3, stop_token_ids=(8,), logit_bias={40: 1.0})
    assert choose(logits, state_of(params, (1, 1))) == [40]
    assert choose(logits, state_of(params, (1, 1, 1))) == [EOS]
    outside = SamplingParams(temperature=0.0, min_tokens=3, stop_token_ids=(10**6,))
    assert choose(logits, state_of(outside)) == [8]


def test_penalties_ignore_what_is_not_theirs() -> None:
    """Presence and frequency count generated tokens only; the repetition penalty counts the prompt too."""
    logits = torch.zeros(VOCAB_SIZE)
    logits[7], logits[2] = 5.0, 4.0
    assert choose(
        logits, state_of(SamplingParams(temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0))
    ) == [7]
    assert choose(logits, state_of(SamplingParams(temperature=0.0, presence_penalty=2.0), (7,))) == [2]
    assert choose(logits, state_of(SamplingParams(temperature=0.0, repetition_penalty=2.0))) == [2]


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {}, {"top_k": 4}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str
)
def test_scores_that_are_no_numbers_are_an_error(options: dict[str, Any]) -> None:
    good, broken = random_logits(0), random_logits(1)
    broken[17] = float("nan")
    infinite = random_logits(2)
    infinite[4] = float("inf")
    states = [state_of(SamplingParams(seed=seed, **options)) for seed in range(4)]
    token_ids, errors = Rows(VOCAB_SIZE, states).choose(
        torch.stack((good, broken, torch.full_like(good, -torch.inf), infinite))
    )
    assert errors[0] is None and token_ids[:1] == choose(good, states[0])
    assert all(0 <= token_id < VOCAB_SIZE for token_id in token_ids), "the next step looks these up"
    assert "not numbers" in (errors[1] or "")
    assert "no token is allowed" in (errors[2] or "")
    assert "not numbers" in (errors[3] or "")


class OnlyThese:
    """A hook that allows a few tokens to one sequence."""

    def __init__(self, seq_id: int, allowed: Sequence[int]) -> None:
        self._seq_id, self._allowed = seq_id, list(allowed)

    def start(self, seq_id: int, start: Any) -> None: ...

    def end(self, seq_id: int) -> None: ...

    def active(self, seq_ids: Sequence[int]) -> bool:
        return self._seq_id in seq_ids

    def mask(self, seq_ids: Sequence[int], logits: torch.Tensor) -> None:
        row = logits[list(seq_ids).index(self._seq_id)]
        allowed = row[self._allowed].clone()
        row.fill_(-torch.inf)
        row[self._allowed] = allowed

    def accept(self, seq_id: int, token_id: int) -> bool:
        return False


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.01}], ids=str
)
def test_hooks_have_the_last_word(options: dict[str, Any]) -> None:
    """A bias cannot bring back what a hook forbids; other sequences are not touched."""
    logits = random_logits(0, 2 * FIRST_CANDIDATES)
    bias = {1: 100.0}
    for seed in range(20):
        params = SamplingParams(seed=seed, logit_bias=bias, **options)
        bound, free = (state_of(params, seq_id=seq_id) for seq_id in (1, 2))
        rows = Rows(len(logits), [bound, free], hooks=[OnlyThese(1, (30, 31))])
        (constrained, other), _ = rows.choose(logits.repeat(2, 1))
        assert constrained in (30, 31)
        assert [other] == choose(logits, free)


@pytest.mark.parametrize("num_rows", [1, 3, 40])
def test_edits_go_on_with_what_was_sampled(num_rows: int) -> None:
    """Step by step, the counts kept beside the scores give what a sequence gets that starts with all tokens known."""
    kinds: list[dict[str, Any]] = [*EDITS, {}, {"temperature": 0.0}]
    prompts = [tuple((7 * row + at) % 30 for at in range(5)) for row in range(num_rows)]
    params = [SamplingParams(seed=row, **kinds[row % len(kinds)]) for row in range(num_rows)]
    generated: list[list[int]] = [[] for _ in range(num_rows)]
    rows = Rows(VOCAB_SIZE, [state_of(*each) for each in zip(params, generated, prompts, strict=True)])
    for step in range(12):
        logits_RV = torch.stack([random_logits(step, scale=1.0)] * num_rows)
        fresh = [state_of(*each) for each in zip(params, generated, prompts, strict=True)]
        expected, _ = Rows(VOCAB_SIZE, fresh).choose(logits_RV.clone())
        found, _ = rows.choose(logits_RV)
        assert found == expected
        for tokens, token_id in zip(generated, found, strict=True):
            tokens.append(token_id)
    assert any(len(set(tokens)) < len(tokens) for tokens in generated), "nothing was penalised"
