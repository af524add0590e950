"""Several ranks: the same answers from every architecture, a dead worker, and ranks that no longer agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
import torch
from tiny_llm import assert_same, make_tiny, open_tiny, random_prompts

from lockstep.attention.paged_backend import PagedBackend
from lockstep.core.errors import ConfigError, EngineDead, IntegrityError
from lockstep.core.probe import ProbePoint
from lockstep.core.request import Request
from lockstep.core.sampling import SamplingParams
from lockstep.engine.assembly import Engine
from lockstep.engine.llm import LLM
from lockstep.engine.messages import StepInputs, Submit
from lockstep.engine.runners import Runners

pytestmark = pytest.mark.suite("cpu")

PARAMS = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2, prompt_logprobs=2)


def worker_of(llm: LLM) -> psutil.Process:
    """The one worker process of an LLM with two ranks."""
    assert llm.config.parallel.tp == 2
    (worker,) = [
        child for child in psutil.Process().children() if "lockstep.engine.worker_main" in child.cmdline()
    ]
    return worker


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1, "vocab_size": 263}),
        ("gemma3", {"intermediate_size": 97}),
    ],
)
def test_two_ranks_answer_like_one(architecture: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """Biases that must be added once, one KV head for both ranks, sizes that do not halve."""
    make_tiny(tmp_path, architecture, **overrides)
    prompts = random_prompts((1, 5, 40))
    with open_tiny(tmp_path) as llm:
        expected = llm.generate(prompts, PARAMS)
    with open_tiny(tmp_path, tp=2) as llm:
        worker = worker_of(llm)
        assert_same(llm.generate(prompts, PARAMS), expected)
        assert_same(llm.generate(prompts, PARAMS), expected)
        llm.flush_cache()
        assert_same(llm.generate(prompts, PARAMS), expected)
    assert not worker.is_running(), "close() leaves no worker behind"


RECORDABLE: Any = SimpleNamespace(provider="a test", why_no_graphs=None)


class Watcher:
    """A probe of the last block's output product; it keeps how many rows it was shown, and how many there were."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def wants(self, point: ProbePoint) -> bool:
        return point.name == "model.layers.1.self_attn.o_proj"

    def begin_step(self, step_id: int, rows: tuple[tuple[int, int], ...]) -> None:
        self._num_rows = len(rows)

    def record(self, point: ProbePoint, value: Any) -> None:
        self.seen.append((self._num_rows, len(value)))


def test_a_probe_on_the_first_rank_is_shown_all_rows(tmp_path: Path) -> None:
    """The last block computes few rows of a prompt, on all ranks; or, with a probe on one of them, all on all."""
    make_tiny(tmp_path)
    prompts, params = random_prompts((1, 5, 40)), replace(PARAMS, prompt_logprobs=None)
    with open_tiny(tmp_path) as llm:
        expected = llm.generate(prompts, params)
    watcher = Watcher()
    for probe in (None, watcher):
        with open_tiny(tmp_path, tp=2, probe=probe) as llm:
            assert_same(llm.generate(prompts, params), expected)
    assert all(found == wanted for wanted, found in watcher.seen) and max(watcher.seen)[0] > 40


@pytest.mark.parametrize("is_watched", [False, True])
def test_a_rank_beside_a_watched_one_pads_no_rows_either(is_watched: bool) -> None:
    """Graphs have rows of padding, which ranks must have alike: one without a probe asks whether another has."""

    class Everyone:
        rank = 1

        def all_gather(self, own: torch.Tensor, dim: int) -> torch.Tensor:
            return torch.tensor([is_watched, *own.tolist()])

    build = SimpleNamespace(device=torch.device("cpu"))
    loaded: Any = SimpleNamespace(build=build, bindings=(), attention=PagedBackend(RECORDABLE, RECORDABLE))
    config: Any = SimpleNamespace(kernels=SimpleNamespace(graphs="full", extend_graphs="piecewise"))
    mesh: Any = SimpleNamespace(everyone=Everyone())
    use = Runners(loaded, config, cast(Any, None), mesh, (), None).graph_use
    assert use.any != is_watched


def test_a_killed_worker_ends_the_engine_with_a_clear_error(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    with open_tiny(tmp_path, tp=2) as llm:
        stream = llm.stream([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True))
        next(stream)
        worker_of(llm).kill()
        with pytest.raises(EngineDead, match="worker process of rank 1 ended with code -9"):
            list(stream)
        with pytest.raises(EngineDead):
            llm.generate([[1, 2, 3]], PARAMS)


def test_heads_that_cannot_be_shared_out_are_refused(tmp_path: Path) -> None:
    make_tiny(tmp_path, hidden_size=60, num_attention_heads=3, num_key_value_heads=1, head_dim=20)
    before = psutil.Process().children()
    with pytest.raises(ConfigError, match="--tp 2 cannot share out 3 query heads and 1 KV heads"):
        open_tiny(tmp_path, tp=2)
    assert psutil.Process().children() == before, "a failed start leaves no worker behind"


def test_a_rank_that_chose_other_tokens_stops(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    request = Request(
        request_id="a", prompt_token_ids=(1, 2, 3), params=SamplingParams(temperature=0.0, max_tokens=8, seed=0)
    )
    options = {"model": str(tmp_path), "dtype": "float32", "threads": 1, "max_total_tokens": 256}
    first, second = Engine(options), Engine(options)
    core, twin = first.rank.core, second.rank.core
    core.follow(StepInputs(0, [Submit(request)], 0))
    twin.follow(StepInputs(0, [Submit(request)], 0))
    for step in range(1, 4):
        inputs = StepInputs(step, [], core.digest)
        assert core.digest == twin.digest != 0
        core.follow(inputs)
        twin.follow(inputs)
    with pytest.raises(IntegrityError, match="diverged before step 4"):
        twin.follow(StepInputs(4, [], core.digest ^ 1))
