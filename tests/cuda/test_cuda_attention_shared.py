"""Keys that sequences share, read once, on an NVIDIA GPU: the kernel, its replays, and an engine's answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_llm import PAGE_SIZE, assert_same, make_tiny, open_tiny, random_prompts

from lockstep.attention.sharing import Sharing
from lockstep.attention.spans import Spans
from lockstep.core.sampling import SamplingParams
from lockstep.ops.attention_decode_shared.contract import Group, case
from lockstep.ops.attention_extend.cases import Layer
from lockstep.ops.contract import Kernel
from lockstep.ops.registry import kernels

pytestmark = pytest.mark.suite("cuda-1", needs=("triton",), seconds=60)

OP = "attention_decode_shared"
TOLERANCE = 2e-3
NUM_TOKENS = 12
PARAMS = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2)
LAYERS = (Layer(16, 8, 128, 16), Layer(32, 8, 128, 16, sinks=True), Layer(32, 4, 128, 1, soft_cap=20.0))


def triton() -> Kernel:
    return next(kernel for kernel in kernels(OP) if kernel.provider == "triton")


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_large_groups_of_several_tiles(layer: Layer, seed: int) -> None:
    """130 sequences: 100 share 2,000 keys, 20 share 500, the others nothing. Again and again, and replayed."""
    groups = (
        Group(2000 // layer.page_size, tuple(range(100))),
        Group(496 // layer.page_size, tuple(range(100, 120))),
    )
    num_keys = [2020 + 7 * row if row < 100 else 500 + 3 * row for row in range(130)]
    with torch.device("cuda"):
        given = list(
            case(torch.bfloat16, layer, num_keys, groups).make(torch.Generator("cuda").manual_seed(seed))
        )
    out = given[8]
    expected = torch.empty_like(out, dtype=torch.float32)
    wide = [each.float() if each is not None and each.is_floating_point() else each for each in given[:8]]
    kernels(OP)[0].function(*wide, expected, *given[9:])
    triton().function(*given)
    torch.testing.assert_close(out.float(), expected, rtol=2**-6, atol=2**-7)
    first = out.clone()
    for _ in range(20):
        out.fill_(torch.nan)
        triton().function(*given)
        assert torch.equal(out, first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        triton().function(*given)
    for _ in range(20):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, first)


@pytest.mark.parametrize("name", ["qwen3", "llama"])
@pytest.mark.parametrize("graphs", ["full", "piecewise", "off"])
def test_an_engine_whose_requests_share_a_prompt(tmp_path: Path, name: str, graphs: str) -> None:
    """Answers are those of an engine that shares nothing; some requests end early, and one shares nothing."""
    make_tiny(tmp_path, name)
    prefix, other, *tails = random_prompts((50 * PAGE_SIZE, 33, *[3 + row % 30 for row in range(48)]), seed=31)
    prompts = [other, *([*prefix, *tail] for tail in tails)]
    with open_tiny(tmp_path, device="cpu", disable_radix_cache=True) as llm:
        expected = [llm.generate([prompt], PARAMS)[0] for prompt in prompts]
    found_any: list[bool] = []
    with open_tiny(tmp_path, device="cuda", graphs=graphs, max_running_requests=64) as llm:
        decode = llm._engine.rank.core.executor._attention._decode
        own = decode._finder.of

        def noted(spans: Spans) -> Sharing | None:
            found_any.append(own(spans) is not None)
            return own(spans)

        decode._finder.of = noted
        for _ in range(2):
            assert_same(llm.generate(prompts, PARAMS), expected, TOLERANCE)
    assert sum(found_any) >= 2 * (NUM_TOKENS - 2), "keys were shared in nearly every step"
