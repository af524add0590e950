"""Tokenizers built from GGUF metadata, against plain-Python BPE and against transformers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import regex
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from lockstep.core.errors import InvalidRequest, ModelFileError
from lockstep.formats import ModelFiles
from lockstep.tokenizer.loading import load_tokenizer
from lockstep.tokenizer.pre_tokenizers import pre_tokenization
from lockstep.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.suite("cpu")

SPACE = "\u2581"


def byte_alphabet() -> dict[int, str]:
    """GPT-2's bytes_to_unicode, as its paper's code states it."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {byte: chr(byte) for byte in kept}
    for byte in range(256):
        if byte not in alphabet:
            alphabet[byte] = chr(256 + len(alphabet) - len(kept))
    return alphabet


def merge_greedily(pieces: list[str], rank: Callable[[str, str], float | None]) -> list[str]:
    """Merges the adjacent pair of lowest rank, leftmost first, until none has a rank."""
    while True:
        ranked = [
            (found, index)
            for index in range(len(pieces) - 1)
            if (found := rank(pieces[index], pieces[index + 1])) is not None
        ]
        if not ranked:
            return pieces
        _, index = min(ranked)
        pieces[index : index + 2] = [pieces[index] + pieces[index + 1]]


def split_on(text: str, tokens: Sequence[str]) -> list[str]:
    """`text` cut so that each of `tokens`, longest first, is a piece of its own."""
    if not tokens:
        return [text]
    pattern = "|".join(regex.escape(token) for token in sorted(tokens, key=len, reverse=True))
    return [piece for piece in regex.split(f"({pattern})", text) if piece]


def smollm_words(text: str) -> list[str]:
    """Digits are words of their own, then GPT-2's words of what lies between."""
    gpt2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    return [word for part in regex.split(r"(\p{N})", text) for word in gpt2.findall(part)]


@pytest.fixture(scope="module")
def python_bpe(embedded_files: ModelFiles) -> Callable[[str], list[int]]:
    metadata = embedded_files.metadata
    ids = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(pair.split(" ")): rank for rank, pair in enumerate(metadata["tokenizer.ggml.merges"])}
    kinds = metadata["tokenizer.ggml.token_type"]
    special = [token for token, index in ids.items() if kinds[index] == 3]
    alphabet = byte_alphabet()

    def encode(text: str) -> list[int]:
        found = []
        for part in split_on(text, special):
            if part in special:
                found.append(ids[part])
                continue
            for word in smollm_words(part):
                spelled = [alphabet[byte] for byte in word.encode()]
                pieces = merge_greedily(spelled, lambda left, right: ranks.get((left, right)))
                found += [ids[piece] for piece in pieces]
        return found

    return encode


@pytest.mark.suite("cpu", exclusive=True)
def test_embedded_tokenizer_is_built_fast(embedded_files: ModelFiles) -> None:
    load_tokenizer(embedded_files)
    best_s = min(_seconds(lambda: load_tokenizer(embedded_files)) for _ in range(3))
    assert best_s < 0.4


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def test_embedded_ids_equal_plain_python_bpe(
    embedded: Tokenizer, python_bpe: Callable[[str], list[int]], texts: tuple[str, ...]
) -> None:
    for text in texts:
        assert embedded.encode(text) == python_bpe(text), repr(text)


def test_embedded_ids_equal_transformers_where_it_knows_the_rules(
    embedded: Tokenizer, embedded_files: ModelFiles, texts: tuple[str, ...]
) -> None:
    reference = AutoTokenizer.from_pretrained(embedded_files.path.parent, gguf_file=embedded_files.path.name)
    compared = 0
    for text in texts:
        if regex.search(r"\p{N}", text):  # transformers does not know that this model cuts digits apart
            continue
        compared += 1
        ids = embedded.encode(text)
        assert ids == reference.encode(text), repr(text)
        assert embedded.decode(ids, skip_special_tokens=False) == reference.decode(ids), repr(text)
        assert embedded.decode(ids) == reference.decode(ids, skip_special_tokens=True), repr(text)
    assert compared > 50


def test_embedded_facts(embedded: Tokenizer) -> None:
    assert embedded.vocab_size == 49152
    assert embedded.eos_token_ids == (2,)
    assert embedded.bos_token_id == 1
    assert embedded.special_token_ids == frozenset(range(17))
    assert embedded.token_bytes(2) == b"<|im_end|>"
    assert embedded.token_bytes(49152) == b"" == embedded.token_bytes(-1)


def test_special_tokens_in_text_are_text_when_not_parsed(embedded: Tokenizer) -> None:
    text = "<|im_end|>hi"
    assert embedded.encode(text)[0] == 2
    plain = embedded.encode(text, parse_special=False)
    assert not embedded.special_token_ids & set(plain)
    assert embedded.decode(plain) == text
    assert embedded.encode(text)[0] == 2


def test_token_bytes_spell_the_text(embedded: Tokenizer, texts: tuple[str, ...]) -> None:
    for text in texts:
        spelled = b"".join(embedded.token_bytes(i) for i in embedded.encode(text))
        assert spelled == text.encode()


def test_token_text_shows_partial_characters_as_bytes(embedded: Tokenizer) -> None:
    shown = [embedded.token_text(i) for i in embedded.encode("é🤖")]
    assert any(text.startswith("bytes:\\x") for text in shown)
    assert embedded.token_text(embedded.encode(" the")[0]) == " the"


def test_half_a_surrogate_pair_is_an_invalid_request(embedded: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        embedded.encode("a\ud83d")


@pytest.mark.parametrize("name", ["llama-bpe", "llama3", "qwen2", "qwen35"])
def test_pre_tokenizers_equal_transformers(name: str, texts: tuple[str, ...]) -> None:
    split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    _check_pre_tokenizer(name, pre_tokenizers.Sequence([split, byte_level]), texts)


def test_pre_tokenizers_of_gpt2_and_smollm_equal_the_library(texts: tuple[str, ...]) -> None:
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    _check_pre_tokenizer("gpt-2", gpt2, texts)
    smollm = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    _check_pre_tokenizer("smollm", smollm, texts)


def _check_pre_tokenizer(name: str, expected: Any, texts: tuple[str, ...]) -> None:
    built = pre_tokenization(name).build()
    for text in texts:
        assert built.pre_tokenize_str(text) == expected.pre_tokenize_str(text), repr(text)


def test_default_pre_tokenizer_cuts_punctuation_and_three_digits() -> None:
    pieces = [piece for piece, _ in pre_tokenization("default").build().pre_tokenize_str("a 12345!? it's")]
    assert pieces == ["a", "Ġ", "123", "45", "!?", "Ġit", "'", "s"]


def sentencepiece_values() -> dict[str, Any]:
    """A vocabulary like Llama 2's: specials, byte tokens, pieces with falling scores, letters last."""
    pieces = [f"{SPACE}t", "he", "in", f"{SPACE}a", "er", f"{SPACE}the", "re", "th", f"{SPACE}{SPACE}", "on"]
    pieces += [
        "ing",
        f"{SPACE}in",
        "ere",
        f"{SPACE}there",
        "日本",
        f"{SPACE}{SPACE}{SPACE}{SPACE}",
        "aa",
        "aaa",
    ]
    letters = [SPACE, *"abcdefghijklmnopqrstuvwxyz.,'", "日", "本", "é"]
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *pieces,
        *letters,
        "  ",
        "<tool>",
    ]
    num_pieces = len(pieces) + len(letters)
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-float(index) for index in range(num_pieces)] + [0.0, 0.0],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * num_pieces + [4, 4],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


SENTENCEPIECE_TEXTS = (
    "there", " there", "the thing in there", "", " ", "   ", "aaaaa", "日本é ß🙂", "a\nb\tc", "the  re",
    "</s>there", "the<s>a</s>", "<tool>in", "x<tool> on", "<unk>", "<0x41>", "A\u2581b",
)  # fmt: skip


def python_sentencepiece(values: dict[str, Any], text: str, *, prefix: bool) -> list[int]:
    """SentencePiece BPE as llama.cpp states it: best score first, a space after each special, byte fallback."""
    tokens, kinds, scores = values["tokens"], values["token_type"], values["scores"]
    ids = {token: index for index, token in enumerate(tokens)}
    normal = {token: scores[index] for token, index in ids.items() if kinds[index] == 1}
    found = []
    for part in split_on(text, [token for token, index in ids.items() if kinds[index] in (2, 3, 4)]):
        if part in ids and kinds[ids[part]] in (2, 3, 4):
            found.append(ids[part])
            continue
        letters = list(((" " if prefix else "") + part).replace(" ", SPACE))
        for piece in merge_greedily(letters, lambda left, right: _negated(normal.get(left + right))):
            if piece in normal:
                found.append(ids[piece])
            else:
                found += [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return found


def _negated(score: float | None) -> float | None:
    return None if score is None else -score


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_equals_plain_python(gguf_files: Callable[..., Any], prefix: bool) -> None:
    values = sentencepiece_values()
    tokenizer = load_tokenizer(gguf_files(**values, add_space_prefix=prefix))
    for text in SENTENCEPIECE_TEXTS:
        expected = python_sentencepiece(values, text, prefix=prefix)
        assert tokenizer.encode(text, add_special_tokens=False) == expected, repr(text)
        assert tokenizer.encode(text) == [1, *expected]


def test_sentencepiece_prefix_space_comes_and_goes(gguf_files: Callable[..., Any]) -> None:
    tokenizer = load_tokenizer(gguf_files(**sentencepiece_values()))
    for text in ("there", " there", "日本é ß🙂", "in the thing", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.token_bytes(3 + 0xE4) == b"\xe4"
    assert tokenizer.decode([0, 1, 2]) == ""
    assert tokenizer.decode([1], skip_special_tokens=False) == "<s>"


@pytest.mark.parametrize(
    ("flags", "before", "after"),
    [
        ({}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_eos_token": True}, [1], [2]),
        ({"add_bos_token": False, "add_eos_token": True}, [], [2]),
    ],
)
def test_surrounding_tokens_follow_the_flags(
    gguf_files: Callable[..., Any], flags: dict[str, bool], before: list[int], after: list[int]
) -> None:
    tokenizer = load_tokenizer(gguf_files(**sentencepiece_values(), **flags))
    inner = tokenizer.encode("there", add_special_tokens=False)
    assert tokenizer.encode("there") == [*before, *inner, *after]


def byte_level_values(**changes: Any) -> dict[str, Any]:
    letters = sorted(byte_alphabet().values())
    values = {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": [*letters, "<s>", "</s>", "ab", "abc"],
        "token_type": [1] * 256 + [3, 3, 1, 1],
        "merges": ["a b"],
        "bos_token_id": 256,
    }
    return {**values, **changes}


def test_llama3_adds_its_beginning_and_takes_whole_words(gguf_files: Callable[..., Any]) -> None:
    tokenizer = load_tokenizer(gguf_files(**byte_level_values()))
    assert tokenizer.encode("abc") == [256, 259]  # no merge makes "abc", but it is a token
    qwen = load_tokenizer(gguf_files(**byte_level_values(pre="qwen2")))
    assert qwen.encode("abc") == [258, sorted(byte_alphabet().values()).index("c")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "qwen3"}, "pre-tokenizer 'qwen3'.*did you mean 'qwen35'"),
        ({"model": "gpt3"}, "tokenizer model 'gpt3'.*did you mean 'gpt2'"),
        ({"model": None}, "no tokenizer.*tokenizer.ggml.model"),
        ({"tokens": None}, "no tokenizer.*tokenizer.ggml.tokens"),
        ({"merges": None}, "no tokenizer.*tokenizer.ggml.merges"),
        ({"merges": ["a q!"]}, "damaged"),
        ({"token_type": [1]}, "260 tokens but 1 token types"),
    ],
)
def test_unusable_metadata_is_one_line(
    gguf_files: Callable[..., Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelFileError, match=message) as caught:
        load_tokenizer(gguf_files(**byte_level_values(**changes)))
    assert "\n" not in str(caught.value)
