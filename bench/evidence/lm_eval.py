"""lm-eval's `local-completions` against `lockstep serve`, on two tasks whose data are in the repository."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from served import served
from transformers import AutoTokenizer

from evidence.part import Findings, Part
from lockstep.core.errors import LockstepError
from lockstep.formats import embedded_model_path
from peers.environments import DEFAULT_CACHE, Distribution, install

ROOT = Path(__file__).parents[2]
ENVIRONMENT = DEFAULT_CACHE / "lm-eval"
HARNESS = Distribution("lm_eval", "0.4.13", ("lm_eval[api]", "transformers>=5"))
TASKS = "tests/engine/lm_eval_task"
NAMES = "capitals_choice,capitals_answer"
LEAST_SHARE = 0.75
"""Of either task; what the embedded model says of capitals is mostly right."""


def collect() -> Findings:
    """Raises ConfigError when lm-eval cannot be installed, LockstepError when it fails."""
    install(HARNESS, ENVIRONMENT)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lockstep-lm-eval-")))
        server = stack.enter_context(served(folder / "server", "--device", "cpu"))
        model = server.http.get("/v1/models").json()["data"][0]["id"]
        said = _run_harness(
            f"{server.url}/v1/completions", model, _save_tokenizer(folder / "tokenizer"), folder
        )
    lines = [line.strip() for line in said.splitlines() if line.startswith("|")]
    shares = scores(lines)
    return {
        "passed": len(shares) == 3 and min(shares.values()) >= LEAST_SHARE,
        "harness": f"{HARNESS.name} {HARNESS.version}",
        "model": model,
        "table": lines,
        "scores": shares,
    }


def page(found: Mapping[str, Any]) -> str:
    arguments = (
        f"model={found['model']},base_url=http://HOST:PORT/v1/completions,tokenizer=DIRECTORY,num_concurrent=4"
    )
    return "\n".join(
        [
            f"{found['harness']}, its own table. `capitals_choice` asks for the log-likelihoods of four continuations, "
            "`capitals_answer` for the model's own words; 12 questions each, from "
            f"[a file]({'../../../' + TASKS}/capitals.jsonl).",
            "",
            "```sh",
            f"lm_eval --model local-completions --tasks {NAMES} --include_path {TASKS} \\",
            f"    --model_args {arguments}",
            "```",
            "",
            *found["table"],
        ]
    )


def scores(lines: list[str]) -> dict[str, float]:
    """Task and metric -> value, from the harness's table; the name of a task stands in its first row only."""
    found, task = {}, ""
    for line in lines[2:]:
        cells = [one.strip() for one in line.strip("|").split("|")]
        task = cells[0] or task
        found[f"{task} {cells[4]}"] = float(cells[6])
    return found


def _save_tokenizer(folder: Path) -> Path:
    """The embedded model's tokenizer as transformers reads it from the file: the harness cuts texts by itself."""
    path = embedded_model_path()
    AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(folder)
    return folder


def _run_harness(url: str, model: str, tokenizer: Path, folder: Path) -> str:
    arguments = f"model={model},base_url={url},tokenizer={tokenizer},num_concurrent=4"
    command = [str(ENVIRONMENT / "bin" / "lm_eval"), "--model", "local-completions", "--tasks", NAMES]
    command += ["--include_path", TASKS, "--model_args", arguments]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **offline}, capture_output=True, text=True)
    if done.returncode != 0:
        raise LockstepError(f"lm_eval failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


PART = Part("lm-eval", "lm-eval against the server", collect, page)
