"""llama.cpp's scores of known tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from peers.llama_cpp_peer import LlamaContext, LlamaModel

WINDOW_TOKENS = 2048


class LlamaCppScorer:
    """One sequence at a time, in a context of default parameters (its KV cache is float16)."""

    def __init__(self, file: str, threads: int) -> None:
        model = LlamaModel(file)
        self._context = LlamaContext(model, num_sequences=1, sequence_tokens=WINDOW_TOKENS, threads=threads)

    def scores(self, window: Sequence[int], chunk: int) -> Iterator[np.ndarray]:
        """See Scorer."""
        self._context.forget()
        for start in range(0, len(window), chunk):
            rows = [(token, start + at, 0, True) for at, token in enumerate(window[start : start + chunk])]
            yield self._context.decode(rows)
