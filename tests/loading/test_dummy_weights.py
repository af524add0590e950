"""Models of a config.json alone: dummy weights, on any number of ranks, with no tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import tiny_model, write_gguf
from tiny_llm import make_tiny, open_tiny
from tiny_models import LAYOUTS, Layout, build_over

from lockstep.core.errors import ConfigError, InvalidRequest, ModelFileError
from lockstep.core.sampling import Grammar, SamplingParams
from lockstep.engine.dummy import matrices, with_dummy_tensors
from lockstep.engine.llm import LLM
from lockstep.engine.model_files import open_files
from lockstep.layers.build import Place, Slice
from lockstep.models.loading.sources import DummyWeights, ShapeWeights
from lockstep.models.registry import model_class
from lockstep.parallel.mesh import Mesh
from lockstep.tokenizer.token_ids_only import TokenIdsOnly

pytestmark = pytest.mark.suite("cpu")

PARAMS = SamplingParams(temperature=0.0, max_tokens=5, logprobs=2, ignore_eos=True)
DUMMY: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True}
PROMPTS = [[1, 2, 3], [50], list(range(20))]


def config_alone(directory: Path, layout: Layout) -> Path:
    (directory / "config.json").write_text(json.dumps(layout.config | {"torch_dtype": "float32"}))
    return directory


class Recorded(ShapeWeights):
    """Shapes, and which weights were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[str, tuple[int, ...]] = {}

    def load(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, part: Slice | None) -> torch.Tensor:
        self.shapes[name] = shape
        return super().load(name, shape, dtype, part)

    def fill(self, places: Any) -> None:
        self.shapes.update({place.name: place.shape for place in places})


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_the_matrices_are_those_that_the_model_takes(layout: Layout) -> None:
    weights, config = Recorded(), {"tie_word_embeddings": False, **layout.config}
    model_class(config).make(build_over(Mesh.solo(), weights, meta=True), config)
    taken = {name: shape for name, shape in weights.shapes.items() if len(shape) > 1}
    assert dict(matrices(config)) == taken


def test_a_real_model_is_counted(tmp_path: Path) -> None:
    """Qwen3-30B-A3B is stated to have 30.5 billion parameters."""
    sizes = {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151_936,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3MoeForCausalLM"], **sizes}))
    files = with_dummy_tensors(open_files(str(tmp_path), None, "dummy"))
    assert round(files.num_parameters / 1e9, 1) == 30.5 and files.main_storage_type == "BF16"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_family_answers_from_its_config_alone(layout: Layout, tmp_path: Path) -> None:
    with open_tiny(config_alone(tmp_path, layout), **DUMMY, context_length=32) as llm:
        answers = llm.generate(PROMPTS, PARAMS)
        again = llm.generate(PROMPTS, PARAMS)
    for answer, twin in zip(answers, again, strict=True):
        assert len(answer.token_ids) == 5 and answer.text == "" and answer.token_ids == twin.token_ids
        assert all(-20 < found.logprob < 0 for found in answer.logprobs)


def test_ranks_hold_parts_of_the_same_weights(tmp_path: Path) -> None:
    layout = next(layout for layout in LAYOUTS if layout.name == "qwen3 with experts")
    config_alone(tmp_path, layout)
    found = []
    for ranks in ({}, {"tp": 2}, {"ep": 2}):
        with open_tiny(tmp_path, **DUMMY, context_length=32, **ranks) as llm:
            found.append(llm.generate(PROMPTS, PARAMS))
    for answers in found[1:]:
        for one, other in zip(found[0], answers, strict=True):
            assert one.token_ids == other.token_ids
            assert [each.logprob for each in one.logprobs] == pytest.approx(
                [each.logprob for each in other.logprobs], abs=1e-5
            )


def test_a_dummy_depends_on_its_name_and_place_alone() -> None:
    weights = DummyWeights(torch.device("cpu"))
    whole = weights.load("a.weight", (3000, 1500), torch.float32, None)
    assert whole.numel() > DummyWeights._PERIOD and whole.abs().max() <= 1e-3
    assert abs(float(whole.mean())) < 2e-6 and float(whole.std()) == pytest.approx(1e-3 / 3**0.5, rel=1e-3)
    assert torch.equal(
        DummyWeights(torch.device("cpu")).load("a.weight", (3000, 1500), torch.float32, None), whole
    )
    assert not torch.equal(weights.load("b.weight", (3000, 1500), torch.float32, None), whole)
    assert len({tuple(row[:8].tolist()) for row in whole}) == 3000, "no two rows are alike"
    for part in (Slice(0, 2900, 100), Slice(0, 7, 1), Slice(1, 3, 11)):
        expected = whole.narrow(part.dim, part.start, part.length)
        assert torch.equal(weights.load("a.weight", (3000, 1500), torch.float32, part), expected)
    stack = weights.load("s", (4, 6, 10), torch.bfloat16, None)
    target = torch.empty(6, 3, dtype=torch.bfloat16)
    weights.fill([Place(target, "s", (4, 6, 10), Slice(1, 7, 3, 2))])
    assert torch.equal(target, stack[2, :, 7:])
    assert torch.equal(weights.load("model.norm.weight", (5,), torch.float32, None), torch.ones(5))


def test_weights_that_are_there_are_left_alone(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no safetensors at all")
    with open_tiny(tmp_path, load_format="dummy") as llm:
        assert len(llm.generate("hello", PARAMS)[0].token_ids) == 5


def test_text_without_a_tokenizer_is_a_clear_error(tmp_path: Path) -> None:
    config_alone(tmp_path, LAYOUTS[0])
    with pytest.raises(ModelFileError, match="tokenizer"):
        open_tiny(tmp_path, load_format="dummy", context_length=32)
    with open_tiny(tmp_path, **DUMMY, context_length=32) as llm:
        assert isinstance(llm.tokenizer, TokenIdsOnly)
        for ask in (
            lambda: llm.generate("hello"),
            lambda: llm.generate([1], SamplingParams(stop=("x",))),
            lambda: llm.generate([1], SamplingParams(grammar=Grammar("regex", "a+"))),
            lambda: llm.tokenizer.decode([1, 2]),
            lambda: llm.tokenizer.token_text(1),
        ):
            with pytest.raises(InvalidRequest, match="needs a tokenizer, and this engine opened none"):
                ask()


def test_what_cannot_be_a_dummy(tmp_path: Path) -> None:
    path = write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")
    with pytest.raises(ModelFileError, match="need a directory with a config"):
        LLM(str(path), load_format="dummy")
    with pytest.raises(ConfigError, match="load_format takes one of auto, files, dummy, not 'dumy'"):
        LLM(str(path), load_format="dumy")
