"""Crowds: every client gets its whole answer, and clients that leave take nothing from the others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
from askers import Asked, all_begun, asking, off_loop, outcomes, some_begun, story
from served import CHAT, NULL, REAL, Served, eventually, served

pytestmark = pytest.mark.suite("cpu", exclusive=True)

NUM_CLIENTS, NUM_LEAVING = 48, 60


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("load"), *REAL) as running:
        yield running


def test_48_clients_get_the_answers_that_each_would_get_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    """On the null device an answer depends on its seed alone, so a mixed-up or lost token shows."""

    async def crowd(url: str, at_once: int) -> list[str]:
        gate = asyncio.Semaphore(at_once)
        async with asking(url) as asker:

            async def one(number: int) -> str:
                async with gate:
                    outcome = await asker.ask(story(number, 150, stream=number % 2 == 0))
                assert outcome.is_complete, outcome
                assert outcome.usage["completion_tokens"] == 150
                assert outcome.finish_reason == "length"
                return outcome.answer

            return await asyncio.gather(*(one(number) for number in range(NUM_CLIENTS)))

    with served(tmp_path_factory.mktemp("null"), *NULL) as null_server:
        together = asyncio.run(crowd(null_server.url, NUM_CLIENTS))
        alone = asyncio.run(crowd(null_server.url, 1))
        assert together == alone
        assert len(set(together)) == NUM_CLIENTS
        assert null_server.is_idle()


def test_48_clients_of_a_real_model(server: Served) -> None:
    async def crowd() -> None:
        async with asking(server.url) as asker:
            asked = []
            for number in range(NUM_CLIENTS):
                body = story(number, 24, stream=number % 2 == 0)
                if number % 3 == 0:
                    prompt = body.pop("prompt")
                    body |= {"messages": [{"role": "user", "content": prompt}]}
                asked.append(asker.start(body, CHAT if number % 3 == 0 else "/v1/completions"))
            for outcome in await outcomes(asked, 120):
                assert outcome.is_complete, outcome
                assert outcome.usage["completion_tokens"] == 24
                assert outcome.finish_reason == "length"
                assert outcome.answer

    asyncio.run(crowd())
    assert server.is_idle()


def test_60_clients_hang_up_and_their_pages_are_free_within_a_second(server: Served) -> None:
    async def crowd() -> float:
        async with asking(server.url) as asker:
            staying = [asker.start(story(number, 120, stream=True)) for number in range(4)]
            # Before the others come: who waits in the queue behind 4,000 tokens would not begin in time.
            await all_begun(staying)
            leaving: list[Asked] = []
            for number in range(NUM_LEAVING):
                stream, choices = number % 5 != 0, 2 if number % 7 == 0 else 1
                leaving.append(asker.start(story(100 + number, 4000, stream=stream, n=choices)))
            await some_begun(leaving, 8)
            assert (await off_loop(server.load))["num_running_reqs"] > 4
            begin_s = time.monotonic()
            await asyncio.gather(*(one.hang_up() for one in leaving))

            def only_four_stay() -> bool:
                load = server.load()
                return load["num_running_reqs"] <= 4 and load["num_waiting_reqs"] == 0

            await off_loop(lambda: eventually(only_four_stay, 10))
            freed_s = time.monotonic() - begin_s
            for outcome in await outcomes(staying):
                assert outcome.is_complete and outcome.usage["completion_tokens"] == 120
            return freed_s

    freed_s = asyncio.run(crowd())
    print(f"{NUM_LEAVING} clients gone: pages free after {freed_s:.2f} s")
    assert freed_s < 1.0
    assert server.is_idle()


def test_a_client_that_leaves_during_its_prompt_or_in_the_queue_is_forgotten(server: Served) -> None:
    async def crowd() -> None:
        async with asking(server.url) as asker:
            prompt = "the quick brown fox " * 1500
            asked = [asker.start(story(n, 100, prompt=f"{n} {prompt}", stream=n % 2 == 0)) for n in range(6)]
            await off_loop(lambda: eventually(lambda: not server.is_idle(), 10, 0.01))
            await asyncio.gather(*(one.hang_up() for one in asked))
            took_s = await off_loop(lambda: eventually(server.is_idle, 10))
            print(f"6 long prompts gone after {took_s:.2f} s")

    asyncio.run(crowd())


def test_small_answers_are_not_held_back_by_the_network(server: Served) -> None:
    """Nagle's algorithm and a delayed acknowledgement together cost 40 ms an answer, however fast the server."""
    times_s = []
    for _ in range(20):
        begin_s = time.monotonic()
        assert server.http.get("/health").status_code == 200
        times_s.append(time.monotonic() - begin_s)
    print(f"fastest of 20 answers on one connection: {min(times_s) * 1000:.1f} ms")
    assert min(times_s) < 0.03
