"""The comparison with peers: what is asked, when it stops, how visits become figures and verdicts."""

from __future__ import annotations

import math
import random
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.core.clock import ManualClock
from lockstep.core.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from cpu_loss import cut, read_text, verdict
from peers.budget import rounds_within
from peers.divergence import loss
from peers.files import SMALL
from peers.rows import ROWS, chosen_rows
from peers.tables import FIGURES, MOST_LOST_CORES, Results, markdown
from peers.visits import DECODE, FIRST_TOKEN, MEMORY, START, Visit, decode_rate
from peers.workload import Workload

pytestmark = pytest.mark.suite("cpu")

OWN, PEER, OTHER = "lockstep Q4_1", "llama.cpp Q4_1", "openvino F16"


def visit(row: str, round_number: int = 0, lost_cores: float = 0.0, **values: list[float]) -> Visit:
    return Visit(SMALL, row, round_number, values, lost_cores=lost_cores)


def test_prompts_are_the_same_for_everyone_and_new_each_time() -> None:
    first, again = Workload(seed=3), Workload(seed=3)
    prompts = [first.long_prompt(1000, number, repeat) for number in range(3) for repeat in range(4)]
    assert prompts == [again.long_prompt(1000, number, repeat) for number in range(3) for repeat in range(4)]
    assert len({tuple(prompt) for prompt in prompts}) == 12
    together = first.concurrent_prompts(1000, 0)
    assert len({tuple(prompt) for prompt in together}) == first.num_concurrent == 16
    assert {len(prompt) for prompt in together} == {128} and len(first.decode_prompt(1000, 0, 0)) == 32
    assert Workload(seed=4).long_prompt(1000, 0, 0) != prompts[0]
    assert all(0 <= token < 1000 for prompt in prompts for token in prompt)


@pytest.mark.parametrize(
    ("budget_s", "most", "done"), [(100.0, 9, [0, 1, 2]), (10.0, 9, [0]), (100.0, 2, [0, 1])]
)
def test_rounds_stop_before_the_time_is_up(budget_s: float, most: int, done: list[int]) -> None:
    clock = ManualClock()
    found = []
    for number in rounds_within(budget_s, most, clock):
        clock.advance(30.0)
        found.append(number)
    assert found == done


def test_a_row_counts_with_the_medians_of_its_quiet_visits() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    quiet = [[rng.uniform(100, 200) for _ in range(3)] for _ in range(5)]
    visits = [visit(OWN, number, decode=values) for number, values in enumerate(quiet)]
    disturbed = visit(OWN, 5, lost_cores=MOST_LOST_CORES * 2, decode=[1.0])
    spread = Results(SMALL, [*visits, disturbed]).spread(OWN, DECODE)
    medians = [statistics.median(values) for values in quiet]
    assert spread is not None
    assert spread.median == statistics.median(medians)
    assert (spread.min, spread.max) == (min(medians), max(medians))
    alone = Results(SMALL, [disturbed])
    loud = alone.spread(OWN, DECODE)
    assert loud is not None and loud.median == 1.0 and not alone.quiet(OWN)
    assert Results(SMALL, visits).spread(PEER, DECODE) is None


def test_lockstep_is_held_against_the_best_peer_of_each_figure() -> None:
    visits = [
        visit(OWN, decode=[300.0], first_token=[100.0], start=[9.0], memory=[500.0]),
        visit("lockstep run Q4_1", start=[1.0]),
        visit(PEER, decode=[150.0], first_token=[900.0], memory=[400.0], start=[0.7]),
        visit(OTHER, decode=[70.0], first_token=[200.0], memory=[1100.0], start=[5.0]),
    ]
    results = Results(SMALL, visits)
    assert results.own_median(START) == 1.0  # The command's, not the library's.
    told = lines_of(results)
    assert PEER in told["one request, tokens/s"] and "| 2.00 |" in told["one request, tokens/s"]
    assert "both reached" in told["one request, tokens/s"]
    assert OTHER in told["first token of 512, ms"] and "| 0.50 |" in told["first token of 512, ms"]
    assert "first reached" in told["peak memory at 16, MB"]
    assert "both reached" in told["process start to first token, s"]
    assert "| 300 |" in told[OWN] and "| 150 |" in told[PEER]


def test_disturbed_visits_get_no_verdict() -> None:
    visits = [
        visit(OWN, decode=[300.0], first_token=[100.0]),
        visit(PEER, lost_cores=1.0, decode=[150.0], first_token=[900.0]),
        visit(OTHER, decode=[70.0], first_token=[200.0]),
    ]
    told = lines_of(Results(SMALL, visits))
    assert "no verdict: disturbed" in told["one request, tokens/s"]
    assert "both reached" in told["first token of 512, ms"]


def lines_of(results: Results) -> dict[str, str]:
    """The lines of both tables by their first cell."""
    lines = [line for line in markdown(results).splitlines() if line.startswith("|")]
    return {line.split("|")[1].strip(): line for line in lines}


@pytest.mark.parametrize(
    ("key", "own", "peer", "said"),
    [
        (DECODE, 190.0, 100.0, "both reached"),
        (DECODE, 140.0, 100.0, "first reached"),
        (DECODE, 70.0, 100.0, "missed: 0.50 of the first"),
        (FIRST_TOKEN, 55.0, 100.0, "both reached"),
        (FIRST_TOKEN, 79.0, 100.0, "first reached"),
        (FIRST_TOKEN, 100.0, 100.0, "missed: 0.80 of the first"),
        (MEMORY, 450.0, 1.0, "both reached"),
        (MEMORY, 701.0, 9999.0, "missed: 1.00 of the first"),
    ],
)
def test_verdicts_of_targets(key: str, own: float, peer: float, said: str) -> None:
    figure = next(one for one in FIGURES if one.key == key)
    assert figure.verdict(own, peer) == said


def test_failures_are_told_and_first_tokens_compared() -> None:
    own, peer = visit(OWN), visit(PEER)
    own.first_token_ids, peer.first_token_ids, peer.error = [1, 2, 3, 4], [1, 2, 3, 9], "it broke"
    later = Visit(SMALL, PEER, 1, first_token_ids=[1, 2, 3, 4])
    results = Results(SMALL, [own, peer, later])
    assert results.agreement(PEER) == 0.75  # The second round has nothing to be held against.
    assert "Failed: llama.cpp Q4_1, round 0: it broke" in markdown(results)


def test_rows_are_chosen_by_name() -> None:
    assert chosen_rows(SMALL, None) == ROWS[SMALL]
    assert {row.who for row in chosen_rows(SMALL, ["llama.cpp"])} == {"llama.cpp"}
    with pytest.raises(ConfigError, match=r"did you mean 'llama\.cpp'"):
        chosen_rows(SMALL, ["llamacpp"])


def test_divergence_is_torchs() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    expected, found = torch.randn(150, 77) * 3, torch.randn(150, 77) * 3
    got = loss(expected.numpy(), found.numpy())
    reference, other = (one.double().log_softmax(-1) for one in (expected, found))
    kl = torch.nn.functional.kl_div(other, reference, reduction="none", log_target=True).sum(-1)
    np.testing.assert_allclose(got.kl_T, kl.numpy(), rtol=1e-10)
    assert got.top_agreement == (expected.argmax(-1) == found.argmax(-1)).double().mean().item()
    assert got.standard_error == pytest.approx(kl.std().item() / math.sqrt(150))
    shifted = loss(expected.numpy(), expected.numpy() + 5)  # The same distributions.
    assert abs(shifted.mean) < 1e-6 and shifted.top_agreement == 1.0
    with pytest.raises(ValueError, match="cannot be held against"):
        loss(expected.numpy(), found.numpy()[:-1])


def test_a_worse_loss_is_called_worse() -> None:
    rng = np.random.default_rng(0)
    expected = rng.standard_normal((400, 50)).astype(np.float32)
    little = loss(expected, expected + rng.normal(0, 0.05, expected.shape).astype(np.float32))
    much = loss(expected, expected + rng.normal(0, 0.10, expected.shape).astype(np.float32))
    same = loss(expected, expected + rng.normal(0, 0.05, expected.shape).astype(np.float32))
    assert verdict(much, little).startswith("WORSE")
    assert verdict(little, much).startswith("no worse")
    assert verdict(little, same).startswith("no worse")


def test_text_is_cut_into_whole_windows(tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "How many?", "answer": "3"}\n{"question": "Why?", "answer": "x"}\n')
    plain = tmp_path / "plain.md"
    plain.write_text("Text.")
    assert read_text([questions, plain]) == "How many?\n\nWhy?\n\nText."
    windows = cut(range(2000), 1100)
    assert [window[0] for window in windows] == [0, 512] and {len(window) for window in windows} == {512}
    with pytest.raises(ConfigError, match="the text has 100 tokens, 512 are wanted"):
        cut(range(100), 512)


def test_a_decode_rate_leaves_the_first_token_out() -> None:
    from peers.peer import Answer

    assert decode_rate(Answer(0.5, 1.5, 128, [7])) == 127.0
