"""What an NVIDIA GPU's kernels in CUDA C++ are compiled to is there before steps of a new size want it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tiny_llm import make_tiny, open_tiny, random_prompts

from lockstep.core.sampling import SamplingParams
from lockstep.ops import background

pytestmark = pytest.mark.suite("cuda-1", needs=("sm_90", "cuda_bindings"), seconds=40)

WIDE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
}


def test_steps_of_new_sizes_compile_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lockstep.ops import cuda_program

    whole = cuda_program._compiled
    compiled_by: list[str] = []

    def noting(source: bytes, architecture: str) -> bytes:
        compiled_by.append(threading.current_thread().name)
        return whole(source, architecture)

    monkeypatch.setattr(cuda_program, "_compiled", noting)
    monkeypatch.setattr(background, "_MOST_THREADS", 2)
    make_tiny(tmp_path / "model", "qwen3", **WIDE)
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    options = {"device": "cuda", "dtype": "bfloat16", "page_size": 16, "cache_dir": str(tmp_path / "cache")}
    with open_tiny(tmp_path / "model", **options) as llm:
        for thread in threading.enumerate():
            if thread.name == "compiler":
                thread.join()
        assert "compiler" in compiled_by
        num_compiled = len(compiled_by)
        for count in (1, 2, 3, 4, 5, 9, 17, 33, 64):
            llm.generate(random_prompts([5] * count), params)
        assert compiled_by[num_compiled:] == []
