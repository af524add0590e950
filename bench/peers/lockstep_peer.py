"""Lockstep, through its public Python interface."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version

from lockstep import LLM, SamplingParams
from peers.peer import Answer, TokenIds


class LockstepPeer:
    """`LLM` with every option left to it but the threads."""

    def __init__(self, file: str, threads: int) -> None:
        self._llm = LLM(file, threads=threads)

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("lockstep-engine", "torch")}

    def encode(self, text: str) -> list[int]:
        return self._llm.tokenizer.encode(text)

    def generate(self, prompts: Sequence[TokenIds], num_tokens: int) -> Answer:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        if len(prompts) == 1:
            return self._follow(prompts[0], params)
        begin_s = time.perf_counter()
        answers = self._llm.generate(list(prompts), params)
        seconds = time.perf_counter() - begin_s
        ids = [answer.token_ids for answer in answers]
        return Answer(seconds, seconds, sum(map(len, ids)), [one[0] for one in ids])

    def _follow(self, prompt: TokenIds, params: SamplingParams) -> Answer:
        begin_s = time.perf_counter()
        outputs = [
            (time.perf_counter() - begin_s, token_id)
            for output in self._llm.stream(list(prompt), params)
            for delta in output.deltas
            for token_id in delta.token_ids
        ]
        (first_s, first_id), (last_s, _) = outputs[0], outputs[-1]
        return Answer(first_s, last_s, len(outputs), [first_id])
