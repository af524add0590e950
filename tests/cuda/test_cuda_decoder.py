"""All blocks of a decoder in one launch, on NVIDIA's Hopper: any rows and lengths, step after step, in the engine."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llm import make_tiny, open_tiny, random_prompts

from lockstep import SamplingParams
from lockstep.ops.decoder_decode.contract import CONTRACT
from lockstep.ops.decoder_decode.reference import decoder_decode
from lockstep.ops.decoder_forward.outline import (
    AttentionOutline,
    BlockOutline,
    DecoderOutline,
    MLPOutline,
    NormOutline,
    ProductOutline,
)

pytestmark = pytest.mark.suite("cuda-1", needs=("sm_90", "cuda_bindings"), seconds=60)

PAGE_SIZE = 16
NUM_PAGES = 512
WIDE = {
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
}


def drawn(generator: torch.Generator, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).bfloat16()


class Decoder:
    """A random decoder, its pools, and sequences whose pages lie in any order."""

    def __init__(
        self,
        seed: int,
        hidden: int,
        inner: int,
        heads: int,
        kv_heads: int,
        *,
        head_dim: int = 128,
        blocks: int = 3,
    ) -> None:
        from lockstep.ops.decoder_decode.hopper import Program

        self.generator = torch.Generator("cuda").manual_seed(seed)
        self.rng = random.Random(seed)
        self.sizes = (hidden, inner, heads, kv_heads, head_dim)
        self.outline = self._outline(blocks)
        self.pools = drawn(self.generator, blocks, 2, kv_heads, NUM_PAGES, PAGE_SIZE, head_dim)
        torch.cuda.synchronize()
        self.program = Program(self.outline)

    def _outline(self, blocks: int) -> DecoderOutline:
        hidden, inner, heads, kv_heads, head_dim = self.sizes

        def product(outputs: int, inputs: int) -> ProductOutline:
            return ProductOutline((drawn(self.generator, outputs, inputs, scale=inputs**-0.5),))

        def norm(width: int) -> NormOutline:
            return NormOutline(drawn(self.generator, width, scale=0.1) + 1, 1e-6)

        def block() -> BlockOutline:
            qkv = product((heads + 2 * kv_heads) * head_dim, hidden)
            head_norms = {"q_norm": norm(head_dim), "k_norm": norm(head_dim)}
            attention = AttentionOutline(
                qkv, product(hidden, heads * head_dim), 0, head_dim**-0.5, **head_norms
            )
            return BlockOutline(
                norm(hidden),
                attention,
                norm(hidden),
                MLPOutline(product(2 * inner, hidden), product(hidden, inner)),
            )

        nothing = torch.zeros(1, hidden, device="cuda")
        sizes = (hidden, heads, kv_heads, head_dim, inner, "silu", nothing, 1.0, ())
        return DecoderOutline(
            *sizes, tuple(block() for _ in range(blocks)), norm(hidden), ProductOutline((nothing,))
        )

    def step(self, lengths: list[int]) -> tuple[Any, ...]:
        """All arguments but the program and the pools."""
        rows, half = len(lengths), self.sizes[4] // 2
        angles = torch.rand(rows, half, generator=self.generator, device="cuda") * 100
        counts = [-(-length // PAGE_SIZE) for length in lengths]
        pages = self.rng.sample(range(NUM_PAGES), sum(counts))
        table = torch.full((rows, max([*counts, 1]) + 2), -1, dtype=torch.int32)
        for row, count in enumerate(counts):
            table[row, :count] = torch.tensor([pages.pop() for _ in range(count)], dtype=torch.int32)
        num_keys = torch.tensor(lengths, dtype=torch.int32)
        rows_BD = drawn(self.generator, rows, self.sizes[0])
        return rows_BD, angles.cos(), angles.sin(), table.cuda(), num_keys.cuda()

    def run(self, step: tuple[Any, ...], pools: torch.Tensor) -> torch.Tensor:
        return self.program.step(*step, pools, None)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    accepted = CONTRACT.accepted("hidden", torch.bfloat16, torch.bfloat16)
    off = (found.double() - expected.double()).abs()
    assert (off <= accepted.absolute + accepted.relative * expected.double().abs()).all(), off.max()


@pytest.mark.parametrize(
    "sizes", [(1024, 3072, 16, 8), (2048, 2048, 16, 2), (256, 1280, 8, 4), (1280, 256, 4, 4)]
)
@pytest.mark.parametrize("rows", range(1, 9))
def test_any_rows_and_lengths(sizes: tuple[int, int, int, int], rows: int, seed: int) -> None:
    decoder = Decoder(seed, *sizes, blocks=2)
    kinds = (0, 1, 15, 16, 17, 31, 33, 128, 129, 500, 1000)
    for _ in range(3):
        step = decoder.step([decoder.rng.choice(kinds) for _ in range(rows)])
        pools, expected = decoder.pools.clone(), decoder.pools.clone()
        found = decoder.run(step, pools)
        again = decoder.pools.clone()
        assert torch.equal(found, decoder.run(step, again)) and torch.equal(pools, again)
        out = decoder_decode(
            *(each.float() if each.dtype == torch.bfloat16 else each for each in step),
            decoder.outline,
            expected,
        )
        assert_close(found, out)
        changed = (pools != decoder.pools).any(-1)
        assert torch.equal(
            changed.any(0).any(0).any(0), (expected != decoder.pools).any(-1).any(0).any(0).any(0)
        )


def test_step_after_step_without_a_pause(seed: int) -> None:
    """Each step's rows come from the one before it, kernels in between; hundreds of launches give the same bits."""
    decoder = Decoder(seed, 1024, 3072, 16, 8, blocks=4)

    def decoded(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        pools, state, rng = decoder.pools.clone(), decoder.generator.get_state(), decoder.rng.getstate()
        lengths = [1 + 37 * row for row in range(rows)]
        stream, *rest, _ = decoder.step([length + 120 for length in lengths])
        for done in range(100):
            num_keys = torch.tensor(lengths, dtype=torch.int32, device="cuda") + done
            stream = (decoder.run((stream, *rest, num_keys), pools) * 0.5 + 0.1).to(torch.bfloat16)
        decoder.generator.set_state(state)
        decoder.rng.setstate(rng)
        return stream, pools

    for rows in (1, 2, 4, 7):
        first, second = decoded(rows), decoded(rows)
        assert first[0].isfinite().all()
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_passes_are_counted_beyond_the_largest_number(rows: int, seed: int) -> None:
    """The counter of passes goes on from launch to launch, and after days it begins anew."""
    decoder = Decoder(seed, 1024, 3072, 16, 8, blocks=4)
    step = decoder.step([200 + row for row in range(rows)])
    pools = [decoder.pools.clone() for _ in range(3)]
    expected = decoder.run(step, pools[0])
    (exchange,) = decoder.program._exchanges.values()
    exchange[0] = 2**32 - 3
    for found in pools[1:]:
        assert torch.equal(decoder.run(step, found), expected) and torch.equal(found, pools[0])


def test_what_is_no_number_shows(seed: int) -> None:
    decoder = Decoder(seed, 256, 256, 2, 1, blocks=2)
    step = decoder.step([100, 40])
    page = step[3][0, 2]
    decoder.pools[0, 0, 0, page, 3] = torch.nan
    found = decoder.run(step, decoder.pools)
    assert found[0].isnan().any() and found[1].isfinite().all()


def test_steps_of_a_few_rows_are_one_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the engine: the same bits with and without graphs, and every step of few single tokens taken."""
    from lockstep.ops.decoder_decode.hopper import Program

    make_tiny(tmp_path, "qwen3", **WIDE)
    taken: list[int] = []
    step = Program.step

    def counted(self: Program, embedded_BD: torch.Tensor, *given: Any) -> torch.Tensor:
        taken.append(embedded_BD.shape[0])
        return step(self, embedded_BD, *given)

    monkeypatch.setattr(Program, "step", counted)
    prompts = random_prompts([3, 40, 9, 75, 1, 130, 33, 5, 8, 2])
    asked = [
        SamplingParams(temperature=0, max_tokens=12 + 5 * at, ignore_eos=True) for at in range(len(prompts))
    ]
    answers = {}
    for graphs in ("off", "full"):
        taken.clear()
        with open_tiny(tmp_path, dtype="bfloat16", page_size=16, device="cuda", graphs=graphs) as llm:
            answers[graphs] = [each.choices[0].token_ids for each in llm.generate(prompts, asked)]
        # Ten rows in the beginning; one leaves after another, until four are left, then fewer.
        wanted = {4, 3, 2, 1} if graphs == "off" else {4, 2, 1}
        assert set(taken) == wanted and (graphs == "full" or len(taken) >= 5 * 3)
    assert answers["off"] == answers["full"]
    taken.clear()
    with open_tiny(
        tmp_path, dtype="bfloat16", page_size=16, device="cuda", force_kernel=["decoder_decode=reference"]
    ) as llm:
        llm.generate(prompts[:2], asked[:2])
    assert not taken
