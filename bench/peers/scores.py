"""Scores of every next token, by one engine: `python -m peers.scores SCORER FILE THREADS OPTIONS`.

OPTIONS are JSON. A command is a line of JSON on stdin: `windows` (token lists, each computed alone), `chunk` (tokens of
one call: 1 is how answers are decoded) and `out`, a file that gets the scores [tokens of all windows, vocabulary] in
float32. A line of JSON answers each.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np


class Scorer(Protocol):
    """Made of a GGUF file, a number of threads, and options as keywords."""

    def scores(self, window: Sequence[int], chunk: int) -> Iterator[np.ndarray]:
        """float32 scores [rows, V] of the token after each one of `window`, in order, in pieces."""
        ...


SCORERS = {
    "lockstep": ("peers.lockstep_scorer", "LockstepScorer"),
    "llama.cpp": ("peers.llama_cpp_scorer", "LlamaCppScorer"),
}
"""Engine -> the module and class that know it."""


def main(name: str, file: str, threads: str, options: str) -> None:
    """Follows commands until stdin closes."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    module, class_name = SCORERS[name]
    scorer: Scorer = getattr(importlib.import_module(module), class_name)(
        file, int(threads), **json.loads(options)
    )
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        with open(command["out"], "wb") as out:
            for window in command["windows"]:
                for rows in scorer.scores(window, command["chunk"]):
                    rows.astype(np.float32, copy=False).tofile(out)
        print(json.dumps({"bytes": os.path.getsize(command["out"])}), file=replies, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
