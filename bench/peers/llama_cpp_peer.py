"""llama.cpp, through the C interface of llama-cpp-python: no sampler and no Python list stands in its way."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import llama_cpp as api
import numpy as np

from peers.peer import Answer, TokenIds

STEP_TOKENS = 2048
"""Tokens handed over in one call; it cuts them into micro-batches of its own default size."""
SPARE_TOKENS = 32


class LlamaModel:
    """A file, mapped, with its vocabulary."""

    def __init__(self, file: str) -> None:
        api.llama_log_set(_SILENT, None)
        api.llama_backend_init()
        self.handle = api.llama_model_load_from_file(file.encode(), api.llama_model_default_params())
        if not self.handle:
            raise SystemExit(f"llama.cpp cannot load {file}")
        self.vocab = api.llama_model_get_vocab(self.handle)
        self.vocab_size: int = api.llama_vocab_n_tokens(self.vocab)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens in it understood."""
        data = text.encode()
        ids = (api.llama_token * (len(data) + 8))()
        count = api.llama_tokenize(self.vocab, data, len(data), ids, len(ids), True, True)
        return list(ids[:count])


class LlamaContext:
    """KV memory for `num_sequences` of up to `sequence_tokens` each, and a batch to fill."""

    def __init__(self, model: LlamaModel, *, num_sequences: int, sequence_tokens: int, threads: int) -> None:
        self._model = model
        self.num_sequences, self.sequence_tokens = num_sequences, sequence_tokens
        wanted = api.llama_context_default_params()
        wanted.n_ctx = num_sequences * sequence_tokens
        wanted.n_seq_max = num_sequences
        wanted.n_batch = STEP_TOKENS
        wanted.n_threads = wanted.n_threads_batch = threads
        self._handle = api.llama_init_from_model(model.handle, wanted)
        self._batch = api.llama_batch_init(STEP_TOKENS, 0, 1)
        self._tokens = _view(self._batch.token)
        self._positions = _view(self._batch.pos)
        self._counts = _view(self._batch.n_seq_id)
        self._wants = _view(self._batch.logits)
        self._counts[:] = 1

    def forget(self) -> None:
        """Empties all sequences."""
        api.llama_memory_clear(api.llama_get_memory(self._handle), True)

    def decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> np.ndarray:
        """Computes (token, position, sequence, wants scores) rows, at most STEP_TOKENS; scores [those wanted, V].

        The array is llama.cpp's own memory, valid until the next call.
        """
        tokens, positions, sequences, wants = zip(*rows, strict=True)
        count = self._batch.n_tokens = len(rows)
        self._tokens[:count] = tokens
        self._positions[:count] = positions
        self._wants[:count] = wants
        for row, sequence in enumerate(sequences):
            self._batch.seq_id[row][0] = sequence
        if api.llama_decode(self._handle, self._batch) != 0:
            raise RuntimeError(f"llama_decode failed on {count} tokens")
        shape = (sum(wants), self._model.vocab_size)
        return np.ctypeslib.as_array(api.llama_get_logits(self._handle), shape) if shape[0] else np.empty(shape)

    def close(self) -> None:
        """Frees the memory."""
        api.llama_batch_free(self._batch)
        api.llama_free(self._handle)


class LlamaCppPeer:
    """Context parameters are the defaults, but for the sizes and the threads."""

    def __init__(self, file: str, threads: int) -> None:
        self._model = LlamaModel(file)
        self._threads = threads
        self._context: LlamaContext | None = None

    def versions(self) -> dict[str, str]:
        return {"llama-cpp-python": version("llama-cpp-python")}

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def generate(self, prompts: Sequence[TokenIds], num_tokens: int) -> Answer:
        context = self._context_for(len(prompts), max(map(len, prompts)) + num_tokens)
        context.forget()
        begin_s = time.perf_counter()
        last = self._prefill(context, prompts)
        first_s, first_ids = time.perf_counter() - begin_s, list(last)
        lengths = [len(prompt) for prompt in prompts]
        for step in range(num_tokens - 1):
            rows = [(token, lengths[at] + step, at, True) for at, token in enumerate(last)]
            last = context.decode(rows).argmax(-1).tolist()
        seconds = time.perf_counter() - begin_s
        return Answer(first_s, seconds, len(prompts) * num_tokens, first_ids)

    def _prefill(self, context: LlamaContext, prompts: Sequence[TokenIds]) -> list[int]:
        """The first token of each prompt."""
        rows = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        found: list[int] = []
        for start in range(0, len(rows), STEP_TOKENS):
            found += context.decode(rows[start : start + STEP_TOKENS]).argmax(-1).tolist()
        return found

    def _context_for(self, num_sequences: int, num_tokens: int) -> LlamaContext:
        """The context at hand if it is of the right size: making one is not part of an answer."""
        at_hand = self._context
        if at_hand is not None:
            if at_hand.num_sequences == num_sequences and at_hand.sequence_tokens >= num_tokens:
                return at_hand
            at_hand.close()
        self._context = LlamaContext(
            self._model,
            num_sequences=num_sequences,
            sequence_tokens=num_tokens + SPARE_TOKENS,
            threads=self._threads,
        )
        return self._context


def requantise(source: str, target: str, kind: str) -> None:
    """Writes `source` in another format ("Q4_0", "Q8_0", "F16"), as `llama-quantize` would."""
    wanted = api.llama_model_quantize_default_params()
    wanted.ftype = getattr(api, {"F16": "LLAMA_FTYPE_MOSTLY_F16"}.get(kind, f"LLAMA_FTYPE_MOSTLY_{kind}"))
    wanted.allow_requantize = True
    api.llama_log_set(_SILENT, None)
    if api.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(wanted)) != 0:
        raise SystemExit(f"llama.cpp cannot write {source} as {kind}")


@api.llama_log_callback
def _SILENT(level: int, text: bytes, user_data: Any) -> None:
    """Its log would fill the terminal; what fails raises."""


def _view(pointer: Any) -> np.ndarray:
    """An array of the batch, to be filled at once."""
    return np.ctypeslib.as_array(pointer, (STEP_TOKENS,))


if __name__ == "__main__":
    import sys

    requantise(*sys.argv[1:])
