"""Both contenders answer the same jobs of the same model alike, here and in a child process."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest

from lockstep.bench.child import ChildContender, make_contender
from lockstep.bench.contender import Round
from lockstep.bench.contenders import open_contenders
from lockstep.bench.workload import Job
from lockstep.config import Given
from lockstep.core.errors import ConfigError, EngineDead, InvalidRequest, LockstepError
from lockstep.core.sampling import SamplingParams
from lockstep.engine.llm import LLM

pytestmark = pytest.mark.suite("cpu")


def options(model: Path) -> dict[str, Given]:
    return {
        "model": Given(str(model), "command line"),
        "dtype": Given("float32", "command line"),
        "max_total_tokens": Given(2048, "command line"),
        "threads": Given(1, "command line"),
    }


def mixed_jobs(seed: int) -> list[Job]:
    """Prompts and answers of different lengths, one of the prompts a text."""
    rng = random.Random(seed)
    jobs = [Job(tuple(rng.choices(range(256), k=rng.randint(1, 40))), rng.randint(1, 12)) for _ in range(6)]
    return [*jobs, Job("text in place of ids", 5)]


def check_round(found: Round, jobs: list[Job]) -> None:
    assert found.num_output_tokens == sum(job.max_tokens for job in jobs)
    assert found.num_prompt_tokens == sum(len(job.prompt) for job in jobs)
    assert found.trace[-1][1] == found.num_output_tokens
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(found.trace))
    assert found.trace[-1][0] <= found.seconds
    assert found.num_steps >= max(job.max_tokens for job in jobs)
    assert len(found.first_token_s) == len(found.first_token_ids) == len(jobs)
    assert set(found.first_token_s) <= {at_s for at_s, _ in found.trace}


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_contenders_agree(architecture: str, tiny_models: dict[str, Path]) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    jobs = mixed_jobs(seed)
    given = options(tiny_models[architecture])
    found = [make_contender(name, given).run(jobs) for name in ("lockstep", "transformers")]
    for one in found:
        check_round(one, jobs)
    assert found[0].first_token_ids == found[1].first_token_ids
    assert len(set(found[0].first_token_ids)) > 1


def test_a_round_is_what_the_engine_generates(model: Path) -> None:
    jobs = mixed_jobs(0)
    with LLM(**options(model)) as llm:
        expected = [
            llm.generate(job.prompt, SamplingParams(temperature=0, max_tokens=job.max_tokens, ignore_eos=True))
            for job in jobs
        ]
    found = make_contender("lockstep", options(model)).run(jobs)
    assert found.first_token_ids == tuple(answer.token_ids[0] for [answer] in expected)


def test_an_end_token_ends_nothing(model: Path) -> None:
    given = options(model)
    own, other = (make_contender(name, given) for name in ("lockstep", "transformers"))
    rng = random.Random(0)
    jobs = [Job(tuple(rng.choices(range(256), k=3)), 1) for _ in range(2000)]
    answers = zip(jobs, own.run(jobs).first_token_ids, strict=True)
    ending = next(job for job, token_id in answers if token_id in own.card.eos_token_ids)
    for contender in (own, other):
        check_round(contender.run([Job(ending.prompt, 8)]), [Job(ending.prompt, 8)])


def test_fresh_forgets_and_again_finds(model: Path) -> None:
    contender = make_contender("lockstep", options(model))
    jobs = [Job(tuple(range(100)), 4)]
    assert contender.caches_prefixes
    assert contender.run(jobs).num_cached_tokens == 0
    assert contender.run(jobs, fresh=False).num_cached_tokens >= 80
    assert contender.run(jobs).num_cached_tokens == 0


def test_chunked_prompts_keep_the_trace_exact(model: Path) -> None:
    """With eight tokens a step, most steps bring no token, and the trace still ends where the answer does."""
    contender = make_contender("lockstep", {**options(model), "chunked_prefill_size": 8})
    jobs = [Job(tuple(range(start, start + 30)), 6) for start in range(4)]
    found = contender.run(jobs)
    check_round(found, jobs)
    assert found.num_steps >= 4 * 30 / 8
    assert sorted(found.first_token_s) == list(found.first_token_s), "first come, first served"


def test_a_comparison_runs_in_two_processes(model: Path) -> None:
    jobs = mixed_jobs(1)
    with open_contenders(options(model), "transformers") as contenders:
        assert [contender.name for contender in contenders] == ["lockstep", "transformers"]
        assert all(isinstance(contender, ChildContender) for contender in contenders)
        assert contenders[0].card == contenders[1].card
        first, second = (contender.run(jobs) for contender in contenders)
        check_round(first, jobs)
        check_round(second, jobs)
        assert first.first_token_ids == second.first_token_ids
        with pytest.raises(LockstepError, match="lockstep: token id 999 is not one of 0 to 257"):
            contenders[0].run([Job((999,), 1)])
        assert contenders[0].run(jobs).first_token_ids == first.first_token_ids, "it goes on after an error"
        child = contenders[0]
        assert isinstance(child, ChildContender)
        child._process.kill()
        with pytest.raises(EngineDead, match="the process of lockstep ended"):
            child.run(jobs)
    assert [contender._process.poll() for contender in contenders if isinstance(contender, ChildContender)] == [
        -9,
        0,
    ]


def test_a_child_that_cannot_open_says_why() -> None:
    with pytest.raises(LockstepError, match=r"lockstep: absent\.gguf: no such directory or file"):
        ChildContender("lockstep", {"model": Given("absent.gguf", "command line")})


def test_transformers_missing_is_one_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'lockstep-engine\[bench\]'"):
        make_contender("transformers", options(model))


def test_more_jobs_than_the_queue_holds(model: Path) -> None:
    jobs = mixed_jobs(2) * 3
    contender = make_contender("lockstep", {**options(model), "max_queued_requests": 2})
    check_round(contender.run(jobs), jobs)


def test_an_answer_that_finds_no_room_is_an_error(model: Path) -> None:
    contender = make_contender("lockstep", options(model))
    with pytest.raises(InvalidRequest, match=r"max_tokens 40 does not fit .* ask for at most 16"):
        contender.run([Job((1,) * 240, 40)])


def test_an_unknown_contender() -> None:
    with pytest.raises(ConfigError, match="known: lockstep, transformers"):
        make_contender("other", {})
