"""Incremental text equals text at once, however the ids arrive."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.tokenizer.detokenizer import IncrementalDetokenizer
from lockstep.tokenizer.tokenizer import Tokenizer
from lockstep.tokenizer.vocabulary import Vocabulary, sentencepiece_bytes

pytestmark = pytest.mark.suite("cpu")

PIECES = ("<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581the", "re", "é", "🙂", "")
VOCABULARY = Vocabulary(PIECES, sentencepiece_bytes, special=frozenset({0}), verbatim=frozenset({0}))
THE, RE = PIECES.index("\u2581the"), PIECES.index("re")


def spelled(ids: list[int], *, skip: bool, strips: bool) -> str:
    data = b"".join(VOCABULARY.token_bytes(i) for i in ids if not (skip and i == 0))
    text = data.decode("utf-8", errors="replace")
    return text.removeprefix(" ") if strips else text


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, len(PIECES) + 3), max_size=8), max_size=8), st.booleans(), st.booleans()
)
def test_pieces_join_to_the_whole(chunks: list[list[int]], skip: bool, strips: bool) -> None:
    detokenizer = IncrementalDetokenizer(VOCABULARY, skip_special_tokens=skip, strips_leading_space=strips)
    text = "".join(detokenizer.push(chunk) for chunk in chunks) + detokenizer.finish()
    assert text == spelled([i for chunk in chunks for i in chunk], skip=skip, strips=strips)


def test_random_ids_of_the_embedded_model(embedded: Tokenizer) -> None:
    seed = 11
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(200):
        ids = [rng.randrange(embedded.vocab_size + 5) for _ in range(40)]
        for skip in (True, False):
            detokenizer = embedded.detokenizer(skip)
            text = "".join(detokenizer.push([i]) for i in ids) + detokenizer.finish()
            assert text == embedded.decode(ids, skip)


def test_text_token_by_token(embedded: Tokenizer, texts: tuple[str, ...]) -> None:
    for text in texts:
        detokenizer = embedded.detokenizer(skip_special_tokens=False)
        released = ""
        for token_id in embedded.encode(text):
            piece = detokenizer.push([token_id])
            released += piece
            assert text.startswith(released), "released text was taken back"
        assert released == text
        assert detokenizer.finish() == ""


def test_a_character_waits_for_its_last_byte() -> None:
    detokenizer = IncrementalDetokenizer(VOCABULARY)
    assert [detokenizer.push([1 + byte]) for byte in "🙂".encode()] == ["", "", "", "🙂"]
    assert detokenizer.push([1 + 0xE4, 1 + 0xBD]) == ""
    assert detokenizer.finish() == "\ufffd"


@pytest.mark.parametrize(
    ("prompt", "expected"), [([], "there"), ([0], "there"), ([RE], " there"), ([RE, 0], " there")]
)
def test_the_prefix_space_depends_on_the_prompt(prompt: list[int], expected: str) -> None:
    detokenizer = IncrementalDetokenizer(VOCABULARY, strips_leading_space=True, prompt_ids=prompt)
    assert detokenizer.push([THE]) + detokenizer.push([RE]) == expected


def test_answers_continue_a_character_begun_in_the_prompt() -> None:
    data = "x🙂".encode()
    prompt = [1 + byte for byte in data[:3]]
    detokenizer = IncrementalDetokenizer(VOCABULARY, prompt_ids=prompt)
    assert detokenizer.push([1 + byte for byte in data[3:]]) == "🙂"


def test_only_one_prefix_space_goes() -> None:
    detokenizer = IncrementalDetokenizer(VOCABULARY, strips_leading_space=True)
    space = PIECES.index("\u2581")
    assert detokenizer.push([space]) + detokenizer.push([space]) + detokenizer.push([THE]) == "  the"
