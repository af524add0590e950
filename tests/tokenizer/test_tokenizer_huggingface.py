"""Tokenizers of Hugging Face directories, against transformers reading the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer

from lockstep.core.errors import ModelFileError
from lockstep.tokenizer.loading import load_tokenizer

pytestmark = pytest.mark.suite("cpu")

SPECIAL = ["<unk>", "<s>", "</s>"]
MESSAGES = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "yes"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
OTHER_TEMPLATE = "tools: {{ tools | tojson }}"


def byte_level(texts: tuple[str, ...]) -> Tokenizer:
    """Like Qwen's: byte-level BPE, composed characters, a special and a plain added token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False), AddedToken(" Ġ é", special=False)])
    return tokenizer


def sentencepiece(texts: tuple[str, ...]) -> Tokenizer:
    """Like Llama 2's: spaces become U+2581, a prefix space, byte fallback, a beginning token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, *bytes_], limit_alphabet=60)
    tokenizer.train_from_iterator([text.replace(" ", "\u2581") for text in texts], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


Build = Callable[[tuple[str, ...]], Tokenizer]


@pytest.fixture(params=[byte_level, sentencepiece])
def backend(request: pytest.FixtureRequest, texts: tuple[str, ...]) -> Tokenizer:
    build: Build = request.param
    return build(texts)


def save(directory: Path, backend: Tokenizer, **config: Any) -> Any:
    """Writes a directory as transformers does; returns what load_tokenizer reads of its ModelFiles."""
    backend.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return SimpleNamespace(kind="huggingface", path=directory, eos_token_ids=(7,), bos_token_id=None)


def test_ids_and_text_equal_transformers(backend: Tokenizer, tmp_path: Path, texts: tuple[str, ...]) -> None:
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tokenizer = load_tokenizer(save(tmp_path, backend))
    reference = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    reference.no_padding()
    reference.no_truncation()
    for text in texts:
        for special in (True, False):
            ids = tokenizer.encode(text, add_special_tokens=special)
            assert ids == reference.encode(text, add_special_tokens=special).ids, repr(text)
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip), repr(text)


def test_facts_equal_transformers(backend: Tokenizer, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save(tmp_path, backend, chat_template=TEMPLATE))
    reference = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.vocab_size == len(reference)
    assert tokenizer.bos_token_id == reference.bos_token_id == 1
    assert tokenizer.eos_token_ids == (7, reference.eos_token_id)
    assert tokenizer.special_token_ids == set(reference.all_special_ids)
    assert tokenizer.chat_template is not None
    expected = reference.apply_chat_template(MESSAGES, tokenize=False)
    assert tokenizer.chat_template.render(MESSAGES) == expected


@pytest.mark.parametrize("flag", [True, False])
def test_surrounding_tokens_equal_transformers(backend: Tokenizer, tmp_path: Path, flag: bool) -> None:
    tokenizer = load_tokenizer(save(tmp_path, backend, add_bos_token=flag, add_eos_token=flag))
    reference = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("hi there") == reference.encode("hi there")


def test_added_tokens_spell_themselves(texts: tuple[str, ...], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save(tmp_path, byte_level(texts)))
    for added in ("<tool_call>", " Ġ é"):
        (token_id,) = tokenizer.encode(added)
        assert tokenizer.token_bytes(token_id) == added.encode()


def test_template_file_wins_and_named_templates_are_known(texts: tuple[str, ...], tmp_path: Path) -> None:
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": OTHER_TEMPLATE}]
    files = save(tmp_path, byte_level(texts), chat_template=named)
    template = load_tokenizer(files).chat_template
    assert template is not None
    assert template.supports_tools
    assert template.render(MESSAGES, tools=[{"a": 1}]) == 'tools: [{"a": 1}]'
    assert template.render(MESSAGES) == "<s>[user]hi there</s>[assistant]yes</s>"
    (tmp_path / "chat_template.jinja").write_text("from the file", encoding="utf-8")
    template = load_tokenizer(files).chat_template
    assert template is not None
    assert template.render(MESSAGES) == "from the file"


def test_a_directory_without_template_has_none(texts: tuple[str, ...], tmp_path: Path) -> None:
    assert load_tokenizer(save(tmp_path, byte_level(texts))).chat_template is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no tokenizer; tokenizer.json is needed"),
        ("tokenizer.json", '{"version": "1.0", "mod', "damaged or too new"),
        ("tokenizer_config.json", "{", "not JSON"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", '{"chat_template": [1]}', "chat_template must be"),
    ],
)
def test_unusable_files_are_one_line(
    texts: tuple[str, ...], tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    files = save(tmp_path, byte_level(texts))
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelFileError, match=message) as caught:
        load_tokenizer(files)
    assert "\n" not in str(caught.value)


def test_a_lone_sentencepiece_model_is_explained(texts: tuple[str, ...], tmp_path: Path) -> None:
    files = save(tmp_path, byte_level(texts))
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
    with pytest.raises(ModelFileError, match=r"only tokenizer\.model; tokenizer\.json is needed"):
        load_tokenizer(files)


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), decoders.Replace("_", " "), None])
def test_unknown_decoders_are_refused(texts: tuple[str, ...], tmp_path: Path, decoder: Any) -> None:
    backend = byte_level(texts)
    state = json.loads(backend.to_str())
    state["decoder"] = None if decoder is None else json.loads(decoder.__getstate__())
    files = save(tmp_path, backend)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ModelFileError, match=r"decoder .* not supported"):
        load_tokenizer(files)
