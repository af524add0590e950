"""Prompts are decided by the seed alone, and a bad line of a file is named."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice, pairwise
from pathlib import Path

import pytest

from lockstep.bench.http_load import poisson_arrivals
from lockstep.bench.workload import FileWorkload, Job, RandomWorkload, choose_workload, read_jobs
from lockstep.core.errors import ConfigError

pytestmark = pytest.mark.suite("cpu")


def test_random_prompts_have_the_shape_and_differ() -> None:
    batches = list(islice(RandomWorkload(3, 4, 9, 5).batches(50), 3))
    prompts = [job.prompt for batch in batches for job in batch]
    assert [len(batch) for batch in batches] == [4, 4, 4]
    assert len(set(prompts)) == 12
    assert all(len(prompt) == 9 and all(0 <= token_id < 50 for token_id in prompt) for prompt in prompts)
    assert {job.max_tokens for batch in batches for job in batch} == {5}


def test_every_token_is_drawn() -> None:
    [job] = next(RandomWorkload(0, 1, 2000, 1).batches(10))
    assert set(job.prompt) == set(range(10))


def test_the_seed_decides_in_every_process() -> None:
    code = (
        "from lockstep.bench.workload import RandomWorkload\n"
        "print(next(RandomWorkload(7, 2, 6, 1).batches(1000)))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    }
    assert found == {f"{next(RandomWorkload(7, 2, 6, 1).batches(1000))}\n"}
    assert next(RandomWorkload(8, 2, 6, 1).batches(1000)) != next(RandomWorkload(7, 2, 6, 1).batches(1000))


def test_arrivals() -> None:
    arrivals = poisson_arrivals(4000, 50.0, seed=1)
    gaps = [after - before for before, after in pairwise(arrivals)]
    assert arrivals[0] == 0 and len(arrivals) == 4000 and min(gaps) >= 0
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1 / 50, rel=0.05)
    assert deviation == pytest.approx(mean, rel=0.1), "of an exponential distribution both are equal"
    assert arrivals == poisson_arrivals(4000, 50.0, seed=1) != poisson_arrivals(4000, 50.0, seed=2)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    path.write_text('{"prompt": "Grüß dich\u2028"}\n\n{"prompt_token_ids": [1, 2], "max_tokens": 3}\n')
    jobs = [Job("Grüß dich\u2028", 40), Job((1, 2), 3)]
    assert read_jobs(path, 40) == jobs
    asked = choose_workload(path, seed=0, num_requests=None, input_tokens=None, output_tokens=40)
    assert isinstance(asked, FileWorkload)
    assert list(islice(asked.batches(9), 2)) == [jobs, jobs]
    assert asked.describe()["output_tokens"] == 43


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must be a JSON object"),
        ("{}", "needs either prompt or prompt_token_ids"),
        ('{"prompt": "a", "prompt_token_ids": [1]}', "needs either"),
        ('{"promt": "a"}', "unknown field 'promt'; did you mean 'prompt'?"),
        ('{"prompt": ""}', "text that is not empty"),
        ('{"prompt": 3}', "text that is not empty"),
        ('{"prompt_token_ids": []}', "list of integers"),
        ('{"prompt_token_ids": [1, true]}', "list of integers"),
        ('{"prompt_token_ids": [-1]}', "list of integers"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens must be an integer from 1 up, not 0"),
        ('{"prompt": "a", "max_tokens": null}', "not None"),
        ('{"prompt": "a", "max_tokens": 1.5}', "not 1.5"),
    ],
)
def test_a_bad_line_is_named(line: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    path.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(ConfigError) as caught:
        read_jobs(path, 1)
    assert str(caught.value).startswith(f"--workload {path}, line 2: ")
    assert problem in str(caught.value)


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, problem in (("empty", "no request"), ("binary", "cannot be read"), ("absent", "cannot be read")):
        with pytest.raises(ConfigError, match=problem):
            read_jobs(tmp_path / name, 1)


@pytest.mark.parametrize("flag", ["num_requests", "input_tokens"])
def test_a_file_excludes_what_describes_random_prompts(flag: str, tmp_path: Path) -> None:
    counts = {"num_requests": None, "input_tokens": None, "output_tokens": None, flag: 3}
    with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')} describes random prompts"):
        choose_workload(tmp_path / "jobs.jsonl", seed=0, **counts)
    asked = choose_workload(None, seed=0, **counts)
    assert asked.describe()[flag] == 3 and asked.describe()["seed"] == 0
