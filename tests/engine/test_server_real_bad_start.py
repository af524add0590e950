"""A server that cannot start says why in one line, exits with 2 and leaves nothing behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from served import COMMAND, NULL, clean_environment, served

from lockstep.formats import embedded_model_path

pytestmark = pytest.mark.suite("cpu")


def refuse(folder: Path, *arguments: str) -> str:
    """What `lockstep serve` says about its bad arguments."""
    temporary = folder / "private"
    temporary.mkdir()
    done = subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=clean_environment(TMPDIR=str(temporary)),
        timeout=60,
    )
    print(done.stderr, end="")
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert list(temporary.iterdir()) == []
    return done.stderr


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        begin_s = time.monotonic()
        line = refuse(tmp_path, "--port", str(port))
        assert (
            line
            == f"error: port {port} on 127.0.0.1 is in use; choose another with --port, or 0 for a free one\n"
        )
        assert time.monotonic() - begin_s < 5, "known before a model is loaded"


def test_a_second_server_on_the_port_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    with served(tmp_path / "first", *NULL) as server:
        assert "is in use" in refuse(tmp_path, "--port", str(server.port), *NULL)
        assert server.answers()


@pytest.mark.parametrize("num_bytes", [3, 1_000_000, 50_000_000])
def test_a_truncated_model(tmp_path: Path, num_bytes: int) -> None:
    with embedded_model_path().open("rb") as whole:
        (tmp_path / "cut.gguf").write_bytes(whole.read(num_bytes))
    line = refuse(tmp_path, "cut.gguf")
    assert "cut.gguf" in line and "fetch it again" in line


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "noise.gguf").write_bytes(bytes(range(256)) * 1000)
    assert "not a GGUF file" in refuse(tmp_path, "noise.gguf")


def test_a_corrupt_header(tmp_path: Path) -> None:
    """Counts of tensors and of metadata in the header, made absurd."""
    with embedded_model_path().open("rb") as whole:
        content = bytearray(whole.read())
    content[8:24] = b"\xff" * 16
    (tmp_path / "odd.gguf").write_bytes(content)
    assert "odd.gguf" in refuse(tmp_path, "odd.gguf")


def test_a_directory_without_tokenizer(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    assert "tokenizer" in refuse(tmp_path, "model")
    weights = tmp_path / "model" / "model.safetensors"
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps({"model": {"type": "nonsense"}}))
    assert "tokenizer.json" in refuse_again(tmp_path, "model")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in refuse_again(tmp_path, "model")
    weights.unlink()
    assert "safetensors" in refuse_again(tmp_path, "model")


def refuse_again(folder: Path, *arguments: str) -> str:
    """`refuse` for a second time in one folder."""
    (folder / "private").rmdir()
    return refuse(folder, *arguments)


def test_a_pool_too_large_says_how_much_is_needed(tmp_path: Path) -> None:
    line = refuse(tmp_path, "--max-total-tokens", "2000000000")
    for said in (
        "2000000000 tokens",
        "need",
        "TiB",
        "GiB that may be used",
        "what would fit: --max-total-tokens",
    ):
        assert said in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("nosuch.gguf", "no such directory or file"),
        ("folder", "neither config.json nor a .gguf file"),
        ("--tokenizer nosuch", "no such directory or file"),
        ("--chat-template nosuch.jinja", "cannot be read"),
        ("--context-length 100000", "trained for"),
        ("--tp 7", "--tp 7 cannot"),
        ("--device cudaa", "did you mean 'cuda'?"),
        ("--host 192.0.2.7", "cannot listen on 192.0.2.7"),
        ("--tool-call-parser hermez", "did you mean 'hermes'?"),
        ("--mem-fraction-static 0.00001", "what would fit: --mem-fraction-static"),
    ],
)
def test_a_bad_option(tmp_path: Path, arguments: str, said: str) -> None:
    (tmp_path / "folder").mkdir()
    assert said in refuse(tmp_path, *arguments.split())


def test_a_model_that_the_engine_cannot_build_ends_the_server(tmp_path: Path) -> None:
    """Known only after the weights were looked at, in the engine process, which must not linger."""
    before = set(psutil.Process(os.getpid()).children(recursive=True))
    line = refuse(tmp_path, "--tp", "2", "--force-kernel", "linear=nosuch")
    assert "nosuch" in line
    assert set(psutil.Process(os.getpid()).children(recursive=True)) <= before
