"""The comparison with peers: processes, memory, the random model's file, scores of known tokens."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_files import tiny_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from lockstep.core.errors import LockstepError
from lockstep.formats import open_model

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from make_gguf import QWEN2_HALF_BILLION, Qwen2Shape, tensors, write_random_model
from peers.environments import module_environment
from peers.machine import Processors, parse_high_water, parse_stat, peak_rss_mb
from peers.visits import Visit, Worker

pytestmark = pytest.mark.suite("cpu")

FAKE_PEER = """
import json, sys
print(json.dumps({"versions": {"fake": "1"}}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["num_tokens"] == 13:
        sys.exit("unlucky")
    count = len(asked["prompts"]) * min(asked["num_tokens"], 5)
    reply = {"first_token_s": 0.5, "seconds": 1.0, "num_tokens": count, "first_token_ids": [7]}
    print(json.dumps(reply), flush=True)
"""
TINY = Qwen2Shape(
    num_hidden_layers=2,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=50_000,
    context_length=128,
)


def test_a_worker_is_asked_and_its_death_is_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Worker.running("fake", [sys.executable, "-c", FAKE_PEER], log) as worker:
        assert worker.versions == {"fake": "1"} and worker.start_s > 0
        assert worker.ask([[1], [2]], 4).num_tokens == 8
        with pytest.raises(LockstepError, match="answered 5 tokens instead of 1 x 6"):
            worker.ask([[1]], 6)
        with pytest.raises(LockstepError, match="ended in the middle"):
            worker.ask([[1]], 13)
    assert "unlucky" in log.read_text()


def test_a_visit_survives_its_line_of_json() -> None:
    visit = Visit("m", "r", 2, {"decode": [1.5, 2.5]}, [3], {"a": "1"}, 0.25, 9.0, "no")
    assert Visit.from_json(visit.as_json()) == visit


def test_proc_is_read_as_its_manual_page_says() -> None:
    stat = "cpu  100 20 30 4000 500 6 7 80 9 10\ncpu0 1 2 3 4 5 6 7 8 9 10\n"
    assert parse_stat(stat, 100) == (1.63, 0.8)
    assert parse_high_water("Name:\tx\nVmHWM:\t    2000 kB\nVmRSS:\t 1 kB\n") == 2.048
    assert parse_high_water("Name:\tx\n") == 0.0
    before, after = Processors(10.0, 1.0, 5.0), Processors(14.0, 1.5, 8.0)
    assert after.lost_since(before) == 1.5  # One second of others, half a second stolen.
    assert Processors(10.0, 1.0, 9.0).lost_since(before) == 0.0


def test_peak_memory_is_the_kernels_and_counts_children() -> None:
    own_mb = peak_rss_mb(os.getpid())[0]
    assert own_mb == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, rel=0.02)
    code = "import sys; held = bytearray(60_000_000); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert any(60 < one < 90 for one in peak_rss_mb(os.getpid())[1:])
        assert 60 < peak_rss_mb(child.pid)[0] < 90
        child.communicate()


def test_the_random_model_has_a_qwen2s_tensors(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_random_model(TINY, path)
    files = open_model(path)
    config = Qwen2Config(
        vocab_size=TINY.vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        expected = {name: tuple(one.shape) for name, one in Qwen2ForCausalLM(config).named_parameters()}
    assert {name: info.shape for name, info in files.tensors.items()} == expected
    assert files.config["tie_word_embeddings"] and files.config["rope_theta"] == 1_000_000.0
    stored = {info.stored_name: info for info in files.tensors.values()}
    assert stored["token_embd.weight"].storage_type == "Q8_0"
    up = stored["blk.0.ffn_up.weight"]
    packed = np.fromfile(path, np.uint8, up.nbytes, offset=up.offset)
    values = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[up.storage_type])
    assert up.storage_type == "Q4_0" and values.size == 64 * 96
    assert 0.015 < values.std() < 0.025 and abs(values.mean()) < 0.002
    assert len(set(files.metadata["tokenizer.ggml.tokens"])) == TINY.vocab_size


def test_the_half_billion_shape_has_its_published_number_of_parameters() -> None:
    # The model card of Qwen2.5-0.5B: 0.49 billion; exactly 494,032,768 by its safetensors index.
    assert sum(int(np.prod(size)) for _, size, _ in tensors(QWEN2_HALF_BILLION)) == 494_032_768


def test_scores_are_those_of_transformers(model: Path, tmp_path: Path) -> None:
    transformer = tiny_model("llama", vocab_size=258)
    windows = [[5, 250, 3, 77, 12, 9, 101, 44, 45], [1, 2, 3, 5]]
    with torch.no_grad():
        expected = np.concatenate([transformer(torch.tensor([window])).logits[0].numpy() for window in windows])
    options = json.dumps({"dtype": "float32", "context_length": 64})
    commands = [
        json.dumps({"windows": windows, "chunk": chunk, "out": str(tmp_path / f"{chunk}.f32")})
        for chunk in (512, 4, 1)
    ]
    done = subprocess.run(
        [sys.executable, "-m", "peers.scores", "lockstep", str(model), "1", options],
        input="\n".join(commands),
        text=True,
        capture_output=True,
        env=module_environment(),
    )
    assert done.returncode == 0, done.stderr
    for chunk in (512, 4, 1):
        found = np.fromfile(tmp_path / f"{chunk}.f32", np.float32).reshape(expected.shape)
        np.testing.assert_allclose(found, expected, atol=1e-4)
