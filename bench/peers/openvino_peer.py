"""OpenVINO GenAI, which reads GGUF files directly, through its continuous batching."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
import openvino
import openvino_genai as genai

from peers.peer import Answer, TokenIds

STEP_TOKENS = 2048
"""Most tokens of one step: its own default, 256, cuts a prompt of 512 in two."""


class OpenVinoPeer:
    """`ContinuousBatchingPipeline` on the CPU, stepped here; numbers held as it likes best on this processor."""

    def __init__(self, file: str, threads: int) -> None:
        scheduling = genai.SchedulerConfig()
        scheduling.max_num_batched_tokens = STEP_TOKENS
        properties = {"INFERENCE_NUM_THREADS": threads}
        self._pipeline = genai.ContinuousBatchingPipeline(file, scheduling, "CPU", properties)
        self._num_requests = 0

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("openvino-genai", "openvino")}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._pipeline.get_tokenizer().encode(text).input_ids.data[0].tolist()
        return ids

    def generate(self, prompts: Sequence[TokenIds], num_tokens: int) -> Answer:
        settings = genai.GenerationConfig()
        settings.max_new_tokens = num_tokens
        settings.ignore_eos = True
        settings.do_sample = False
        begin_s = time.perf_counter()
        handles = [self._submit(prompt, settings) for prompt in prompts]
        first_s = None
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            if first_s is None and any(handle.can_read() for handle in handles):
                first_s = time.perf_counter() - begin_s
        seconds = time.perf_counter() - begin_s
        ids = [handle.read_all()[0].generated_ids for handle in handles]
        return Answer(first_s or seconds, seconds, sum(map(len, ids)), [one[0] for one in ids])

    def _submit(self, prompt: TokenIds, settings: genai.GenerationConfig) -> genai.GenerationHandle:
        self._num_requests += 1
        tokens = openvino.Tensor(np.array([prompt], dtype=np.int64))
        return self._pipeline.add_request(self._num_requests, tokens, settings)
