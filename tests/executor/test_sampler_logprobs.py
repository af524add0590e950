"""Log-probabilities against torch's own float64 log_softmax."""

from __future__ import annotations

import pytest
import torch

from lockstep.executor.logprobs import ROWS_AT_ONCE, score_prompt, score_tokens
from lockstep.executor.transfers import Transfers

pytestmark = pytest.mark.suite("cpu")

HOST = Transfers(torch.device("cpu"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logprobs(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    logits_RV = (torch.randn(4, 500, generator=generator) * 8).to(dtype)
    exact_RV = torch.nn.functional.log_softmax(logits_RV.double(), -1)
    token_ids, num_top = [0, 499, 250, int(logits_RV[3].argmax())], [0, 3, 20, 1]
    found = score_tokens(logits_RV, torch.tensor(token_ids), num_top, HOST).read()
    for row, (each, count) in enumerate(zip(found, num_top, strict=True)):
        assert each.token_id == token_ids[row]
        assert each.logprob == pytest.approx(float(exact_RV[row, token_ids[row]]), abs=2e-5)
        assert len(each.top) == count
        values = [value for _, value in each.top]
        assert values == pytest.approx(exact_RV[row].topk(count).values.tolist(), abs=2e-5)
        assert values == pytest.approx([float(exact_RV[row, token]) for token, _ in each.top], abs=2e-5)
        assert values == sorted(values, reverse=True)
    assert found[3].top[0] == (found[3].token_id, found[3].logprob)


def test_huge_scores_stay_finite() -> None:
    found = score_tokens(torch.tensor([[1e30, 0.0, -1e30]]), torch.tensor([0]), [1], HOST).read()
    assert found[0].logprob == 0.0 and found[0].top == ((0, 0.0),)


@pytest.mark.parametrize("num_rows", [0, 1, ROWS_AT_ONCE, 2 * ROWS_AT_ONCE + 1])
def test_prompt_logprobs_come_in_bounded_pieces(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(5)
    hidden_TD, head_DV = (torch.randn(*shape, generator=generator) for shape in ((num_rows + 4, 16), (16, 50)))
    next_ids = torch.randint(50, (num_rows,), generator=generator).tolist()
    sizes: list[int] = []

    def logits_of(rows_TD: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows_TD))
        return rows_TD @ head_DV

    pieces = score_prompt(hidden_TD[:num_rows], logits_of, torch.tensor(next_ids, dtype=torch.int64), 2, HOST)
    found = [row for piece in pieces for row in piece.read()]
    exact = torch.nn.functional.log_softmax((hidden_TD @ head_DV).double(), -1)
    assert [each.token_id for each in found] == next_ids
    assert [each.logprob for each in found] == pytest.approx(
        [float(exact[row, token]) for row, token in enumerate(next_ids)], abs=1e-4
    )
    assert sum(sizes) == num_rows and max(sizes, default=0) <= ROWS_AT_ONCE
