"""What an engine says about its memory, and what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llm import make_tiny, open_tiny, random_prompts

from lockstep.core.sampling import SamplingParams
from lockstep.executor.memory import MemoryLine

pytestmark = pytest.mark.suite("cpu", seconds=5)


def by_name(lines: list[MemoryLine]) -> dict[str, MemoryLine]:
    assert len({line.name for line in lines}) == len(lines)
    return {line.name: line for line in lines}


def test_every_part_is_told(tmp_path: Path) -> None:
    model = make_tiny(tmp_path)
    with open_tiny(tmp_path, max_total_tokens=512, max_running_requests=8, chunked_prefill_size=64) as llm:
        parts = by_name(llm.memory_report())
        assert "workspace" not in parts
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        assert parts["weights"].bytes == pytest.approx(4 * num_parameters, rel=0.02)
        # 2 layers with keys and values of 2 heads of 16 in float32.
        assert parts["KV pool"].bytes == 512 * 2 * 2 * 2 * 16 * 4
        assert parts["page tables"].bytes == 8 * (256 // 4) * 4
        assert not parts["others"].is_own and not parts["free now"].is_own

        (prompt,) = random_prompts([40])
        params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        before = llm.generate([prompt], params)[0]
        measured = by_name(llm.memory_report(measure=True))
        assert "8 sequences that draw" in measured["workspace"].note and measured["workspace"].bytes >= 0
        # Measuring had a pool of its own: what was cached is as it was.
        after = llm.generate([prompt], params)[0]
        assert after.num_cached_tokens > 0 and after.token_ids == before.token_ids


def test_what_is_measured_computes_all_rows(tmp_path: Path) -> None:
    """As a step does that wants them all: fewer rows of the last block would take less than such a step."""
    make_tiny(tmp_path)
    with open_tiny(tmp_path, max_running_requests=4, force_kernel=["decoder_forward=reference"]) as llm:
        rank = llm._engine.rank
        assert rank.sizing is not None and rank.pool is not None
        layer = rank.core.executor._model._layers[-1]  # type: ignore[attr-defined]
        num_rows, mlp = [], layer._mlp

        def watched(ctx: Any, update: Any, residual_TD: torch.Tensor) -> Any:
            num_rows.append(len(residual_TD))
            return mlp(ctx, update, residual_TD)

        layer._mlp = watched
        llm.generate(random_prompts([40]), SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
        rank.sizing.measure()
        assert num_rows == [1, 255, 4 * 63]


def test_a_device_that_is_measured_gets_a_pool_that_fits(tmp_path: Path) -> None:
    """The simulated device, told to measure like an accelerator."""
    make_tiny(tmp_path)
    with open_tiny(tmp_path, device="sim", max_running_requests=4, chunked_prefill_size=32) as llm:
        rank = llm._engine.rank
        assert rank.sizing is not None
        num_pages = rank.sizing.num_pages()
        assert num_pages > 64
        assert by_name(llm.memory_report())["workspace"].note.startswith("measured: 32 tokens; 4 sequences")
