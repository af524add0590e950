"""Long texts are encoded like short ones, and nobody waits for them."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lockstep.core.errors import InvalidRequest
from lockstep.tokenizer import tokenizer as room
from lockstep.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.suite("cpu")

SENTENCE = "The quick brown fox jumps over the lazy dog. "
SPECIAL = "<|im_start|>"


def test_long_texts_have_the_ids_of_short_ones(
    embedded: Tokenizer, texts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_by_one = [embedded.encode(text, parse_special=literal) for text in texts for literal in (True, False)]
    monkeypatch.setattr(room, "LONG_TEXT_CHARACTERS", 0)
    assert one_by_one == [
        embedded.encode(text, parse_special=literal) for text in texts for literal in (True, False)
    ]


def test_half_a_surrogate_pair_in_a_long_text(embedded: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        embedded.encode("x" * room.LONG_TEXT_CHARACTERS + "\ud800")


def test_others_run_while_a_long_text_is_encoded(embedded: Tokenizer) -> None:
    long, short = SENTENCE * 20_000, SENTENCE * 2
    expected = embedded.encode(short)
    with ThreadPoolExecutor(1) as pool:
        encoding = pool.submit(embedded.encode, long)
        waits_s = []
        while not encoding.done():
            begin_s = time.monotonic()
            assert embedded.encode(short) == expected
            time.sleep(0.001)
            waits_s.append(time.monotonic() - begin_s)
    print(f"{len(waits_s)} short texts meanwhile, the slowest in {max(waits_s):.3f} s")
    assert len(encoding.result()) == 10 * 20_000 + 1  # the last blank
    assert len(waits_s) > 20


def test_special_tokens_mean_what_each_thread_says(embedded: Tokenizer) -> None:
    seed = 5
    print(f"seed {seed}")
    meanings = {literal: embedded.encode(SPECIAL, parse_special=not literal) for literal in (True, False)}
    assert len(meanings[False]) == 1 < len(meanings[True])
    wrong: list[bool] = []

    def ask(number: int) -> None:
        rng = random.Random(seed + number)
        for _ in range(300):
            literal = rng.random() < 0.5
            if embedded.encode(SPECIAL, parse_special=not literal) != meanings[literal]:
                wrong.append(literal)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
