"""What speed costs in accuracy: next-token distributions on real text, against the file's weights in float32.

    python bench/cpu_peers.py prepare
    python bench/cpu_loss.py --out loss [--text FILE]...

The reference is Lockstep without quantised products: every weight of the shipped file expanded to float32, float32
activations and KV. Lockstep's kernels and llama.cpp read the same file; formats made from it are shown as well.
Text is cut into windows of 512 tokens that know nothing of each other. "prompt" computes a window at once, "decode"
token by token.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.bench.fingerprint import describe, fingerprint
from lockstep.core.errors import ConfigError, LockstepError
from lockstep.engine.model_files import open_files, open_tokenizer
from peers.divergence import Loss, loss
from peers.environments import BENCH_FOLDER, DEFAULT_CACHE, module_environment, run_module
from peers.files import SMALL, BenchModel, bench_model
from peers.tables import table

WINDOW_TOKENS = 512
NUM_TOKENS, NUM_DECODE_TOKENS = 4096, 1024
PROMPT, DECODE = "prompt", "decode"
SHARE_OF_ERROR = 2.0
"""Standard errors within which two means are called the same."""


@dataclass(frozen=True)
class Contender:
    """An engine on one file. `options` are the engine's own."""

    engine: str
    format: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        kv = self.options.get("kv_cache_dtype")
        return f"{self.engine} {self.format}{f', KV {kv}' if kv else ''}"


MAIN = "Q4_1"
REFERENCE = Contender(
    "lockstep", MAIN, {"dtype": "float32", "kv_cache_dtype": "float32", "quantization": "none"}
)
OWN = Contender("lockstep", MAIN)
RIVAL = Contender("llama.cpp", MAIN)
CONTENDERS = (
    OWN,
    *(Contender("lockstep", MAIN, {"kv_cache_dtype": kind}) for kind in ("bfloat16", "float16", "float32")),
    RIVAL,
    Contender("lockstep", "Q4_0"),
    Contender("llama.cpp", "Q4_0"),
    Contender("lockstep", "Q8_0"),
    Contender("llama.cpp", "Q8_0"),
)


class Measure:
    """Windows of token ids, scored by one contender after the other and held against the reference."""

    def __init__(self, model: BenchModel, cache: Path, threads: int, scratch: Path) -> None:
        self._model, self._cache, self._threads, self._scratch = model, cache, threads, scratch
        self._reference: dict[str, np.ndarray] = {}

    def set_reference(self, asked: Mapping[str, Sequence[Sequence[int]]]) -> None:
        """Scores the windows of each way once, a window at a time: in float32 the way makes no difference."""
        self._reference = self._scores(REFERENCE, asked, chunk=dict.fromkeys(asked, WINDOW_TOKENS))

    def losses(self, contender: Contender, asked: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, Loss]:
        """Way -> loss."""
        found = self._scores(contender, asked, chunk={PROMPT: WINDOW_TOKENS, DECODE: 1})
        return {way: loss(self._reference[way], scores) for way, scores in found.items()}

    def _scores(
        self, who: Contender, asked: Mapping[str, Sequence[Sequence[int]]], *, chunk: Mapping[str, int]
    ) -> dict[str, np.ndarray]:
        file, options = str(self._model.files[who.format]), json.dumps(dict(who.options))
        command = run_module(
            who.engine, self._cache, "peers.scores", who.engine, file, str(self._threads), options
        )
        commands = [
            {"windows": windows, "chunk": chunk[way], "out": str(self._file(who, way))}
            for way, windows in asked.items()
        ]
        lines = "".join(f"{json.dumps(one)}\n" for one in commands)
        done = subprocess.run(
            command, input=lines, env=module_environment(), capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise LockstepError(f"{who.name} gave no scores: {done.stderr.strip().splitlines()[-1:]}")
        return {
            way: np.memmap(self._file(who, way), np.float32, "r").reshape(-1, self._model.vocab_size)
            for way in asked
        }

    def _file(self, who: Contender, way: str) -> Path:
        """The reference's scores stay; everyone else's are overwritten by the next."""
        return self._scratch / f"{'reference' if who is REFERENCE else 'scores'}-{way}.f32"


def read_text(files: Sequence[Path]) -> str:
    """The text of the files, one after the other; of JSON lines, their field "question"."""
    parts = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            text = "\n\n".join(json.loads(line)["question"] for line in text.splitlines())
        parts.append(text)
    return "\n\n".join(parts)


def cut(token_ids: Sequence[int], num_tokens: int) -> list[list[int]]:
    """Whole windows of the first `num_tokens`. Raises ConfigError when there are not so many."""
    if len(token_ids) < num_tokens:
        raise ConfigError(
            f"the text has {len(token_ids)} tokens, {num_tokens} are wanted: add text with --text"
        )
    ends = range(WINDOW_TOKENS, num_tokens + 1, WINDOW_TOKENS)
    return [list(token_ids[end - WINDOW_TOKENS : end]) for end in ends]


def verdict(own: Loss, rival: Loss) -> str:
    """Whether the first is no worse than the second, beyond what the choice of tokens explains."""
    gap, error = own.excess_over(rival)
    shown = f"{gap:+.5f} +- {error:.5f}"
    return f"no worse ({shown})" if gap <= SHARE_OF_ERROR * error else f"WORSE ({shown})"


def markdown(found: Mapping[str, Mapping[str, Loss]]) -> str:
    """Contender -> way -> loss, as a table with the verdicts below."""
    lines = [["", "way", "tokens", "mean KL, nats", "median", "99 %", "same likeliest token"]]
    for name, ways in found.items():
        for way, one in ways.items():
            mean = f"{one.mean:.5f} +- {one.standard_error:.5f}"
            cells = [f"{one.median:.5f}", f"{one.percentile_99:.4f}", f"{one.top_agreement:.1%}"]
            lines.append([name, way, str(len(one.kl_T)), mean, *cells])
    text = table(lines)
    if OWN.name in found and RIVAL.name in found:
        for way in found[OWN.name]:
            said = verdict(found[OWN.name][way], found[RIVAL.name][way])
            text += f"\n\n{way}: {OWN.name} against {RIVAL.name}, difference of the means: {said}."
    return text


def measure(
    out: Path,
    texts: Sequence[Path] = (),
    *,
    cache: Path = DEFAULT_CACHE,
    num_tokens: int = NUM_TOKENS,
    num_decode_tokens: int = NUM_DECODE_TOKENS,
) -> str:
    """The report in Markdown, written to the folder after each contender. Without texts: the project's own docs.

    Raises LockstepError when something is missing or an engine fails.
    """
    model = bench_model(SMALL, cache)
    files = texts or sorted((BENCH_FOLDER.parent / "docs").glob("*.md"))
    tokenizer = open_tokenizer(open_files(str(model.files[MAIN])), None, None)
    token_ids = tokenizer.encode(read_text(files))
    wanted = {PROMPT: num_tokens, DECODE: num_decode_tokens}
    asked = {way: cut(token_ids, count) for way, count in wanted.items() if count}
    names = ", ".join(file.name for file in files)
    head = [
        f"Text: {names}; windows of {WINDOW_TOKENS} tokens.",
        *describe(fingerprint()),
        f"`{shlex.join(['python', *sys.argv])}`",
    ]
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Loss]] = {}
    text = ""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lockstep-loss-")))
        measured = Measure(model, cache, len(os.sched_getaffinity(0)), scratch)
        measured.set_reference(asked)
        for contender in CONTENDERS:
            found[contender.name] = measured.losses(contender, asked)
            means = ", ".join(f"{way} {one.mean:.5f}" for way, one in found[contender.name].items())
            print(f"{contender.name}: mean KL {means}", flush=True)
            text = "\n\n".join([markdown(found), "\n".join(f"- {line}" for line in head)]) + "\n"
            (out / "loss.md").write_text(text)
    return text


def main() -> int:
    """The exit code: 2 when something is missing or an engine failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument(
        "--text", type=Path, action="append", metavar="FILE", help="text, or .jsonl  [the docs]"
    )
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS, help=f"scored as prompts  [{NUM_TOKENS}]")
    parser.add_argument(
        "--decode-tokens", type=int, default=NUM_DECODE_TOKENS, help=f"scored one by one  [{NUM_DECODE_TOKENS}]"
    )
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="environments and files")
    arguments = parser.parse_args()
    try:
        report = measure(
            arguments.out,
            arguments.text or (),
            cache=arguments.cache,
            num_tokens=arguments.tokens,
            num_decode_tokens=arguments.decode_tokens,
        )
        print(report)
    except LockstepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
