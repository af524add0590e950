"""A mixture of experts on two real ranks, however they share it, and what cannot be shared."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_moe_model import tiny_model
from tiny_llm import VOCAB_SIZE, assert_same, make_tiny, open_tiny, random_prompts

from lockstep.core.errors import ConfigError, ModelFileError
from lockstep.core.sampling import SamplingParams

pytestmark = pytest.mark.suite("cpu")

PARAMS = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2, prompt_logprobs=2)


def make_mixture(directory: Path) -> None:
    """Seven experts of an odd width: neither halves. The tokenizer is that of the tiny models."""
    make_tiny(directory)
    tiny_model(directory, vocab_size=VOCAB_SIZE, num_experts=7, moe_intermediate_size=33, mlp_only_layers=[1])


def test_every_way_to_share_among_two_ranks_answers_like_one(tmp_path: Path) -> None:
    make_mixture(tmp_path)
    prompts = random_prompts((1, 5, 40))
    with open_tiny(tmp_path) as llm:
        expected = llm.generate(prompts, PARAMS)
    for options in ({"tp": 2}, {"ep": 2}):
        with open_tiny(tmp_path, **options) as llm:
            assert llm.config.parallel.num_ranks == 2
            assert_same(llm.generate(prompts, PARAMS), expected)
            llm.flush_cache()
            assert_same(llm.generate(prompts, PARAMS), expected)


def test_expert_ranks_without_experts(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    with pytest.raises(
        ConfigError, match=r"--ep 2: only mixture-of-experts models use it, and .* has no experts"
    ):
        open_tiny(tmp_path, ep=2)


def test_more_expert_ranks_than_experts(tmp_path: Path) -> None:
    make_mixture(tmp_path)
    with pytest.raises(ConfigError, match="--ep 8 cannot share out the 7 experts"):
        open_tiny(tmp_path, ep=8)


def test_an_expert_too_many_is_noticed_on_expert_ranks(tmp_path: Path) -> None:
    """The first rank takes its own experts alone, and still tells those of others from what nobody takes."""
    make_mixture(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    name = "model.layers.0.mlp.experts.{}.up_proj.weight"
    save_file({**stored, name.format(7): stored[name.format(6)].clone()}, file)
    with pytest.raises(
        ModelFileError, match=r"no layer takes the stored weight model\.layers\.0\.mlp\.experts\.7"
    ):
        open_tiny(tmp_path, ep=2)
