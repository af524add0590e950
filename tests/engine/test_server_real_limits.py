"""What operators set and clients feel: the queue, priorities, deadlines, aborts, the cache, the key."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from askers import Asked, Asker, all_begun, asking, off_loop, outcomes, story
from served import CHAT, COMPLETIONS, REAL, Served, eventually, served

pytestmark = pytest.mark.suite("cpu")

KEY = "sesame-0123"
BEARER = {"Authorization": f"Bearer {KEY}"}
NARROW = ("--max-running-requests", "1", "--max-queued-requests", "3", "--schedule-policy", "priority")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One request at a time, three waiting, and a key."""
    with served(tmp_path_factory.mktemp("limits"), *REAL, *NARROW, "--api-key", KEY) as running:
        running.http.headers.update(BEARER)
        yield running


@pytest.fixture
def idle(server: Served) -> Iterator[Served]:
    """The server, with nothing under way before and after."""
    eventually(server.is_idle, 10)
    yield server
    server.http.post("/abort_request", json={"abort_all": True})
    eventually(server.is_idle, 10)


async def blocked(asker: Asker, server: Served, num_waiting: int = 0) -> list[Asked]:
    """A request that runs, and some that wait behind it."""
    asked = [asker.start(story(0, 2000, stream=True))]
    await all_begun(asked)
    asked += [asker.start(story(1 + n, 4, stream=n % 2 == 0)) for n in range(num_waiting)]
    await queued(server, num_waiting)
    return asked


async def queued(server: Served, num_waiting: int) -> None:
    """Returns when so many requests wait."""
    await off_loop(eventually, lambda: server.load()["num_waiting_reqs"] == num_waiting, 5)


def abort(server: Served, **body: Any) -> int:
    return int(server.http.post("/abort_request", json=body).json()["num_aborted"])


def test_a_full_queue_says_when_to_try_again(idle: Served) -> None:
    async def crowd() -> None:
        async with asking(idle.url, headers=BEARER) as asker:
            asked = await blocked(asker, idle, num_waiting=3)
            for stream in (False, True):
                refused = await asker.ask(story(9, 4, stream=stream))
                assert refused.status == 503
                assert refused.error["code"] == "queue_full" and refused.error["type"] == "server_error"
                assert int(refused.headers["retry-after"]) >= 1
            assert idle.http.get("/health_generate").status_code == 200, "busy is healthy"
            assert await off_loop(abort, idle, abort_all=True) == 4
            found = await outcomes(asked)
            assert [outcome.finish_reason for outcome in found] == ["abort"] * 4
            assert all(outcome.is_complete for outcome in found)
            assert 0 < found[0].usage["completion_tokens"] < 2000
            assert [outcome.usage["completion_tokens"] for outcome in found[1:]] == [0, 0, 0]

    asyncio.run(crowd())


def test_lower_priority_numbers_run_first(idle: Served) -> None:
    async def crowd() -> list[int]:
        ended: list[int] = []

        async with asking(idle.url, headers=BEARER) as asker:
            blocker = asker.start(story(0, 500, stream=True))
            await all_begun([blocker])

            async def one(priority: int) -> None:
                assert (await asker.ask(story(priority, 4, priority=priority))).is_complete
                ended.append(priority)

            waiting = []
            for number, priority in enumerate((5, -1, 3)):
                waiting.append(asyncio.create_task(one(priority)))
                await queued(idle, number + 1)
            await asyncio.gather(*waiting)
            assert (await blocker.outcome()).is_complete
        return ended

    assert asyncio.run(crowd()) == [-1, 3, 5]


def test_a_deadline_ends_running_and_waiting_requests_with_what_they_have(idle: Served) -> None:
    async def crowd() -> None:
        async with asking(idle.url, headers=BEARER) as asker:
            running = asker.start(story(0, 4000, deadline_s=1.0))
            await off_loop(lambda: eventually(lambda: idle.load()["num_running_reqs"] == 1, 5))
            waiting = asker.start(story(1, 4000, deadline_s=0.3, stream=True))
            first, second = await outcomes([running, waiting])
            assert first.is_complete and second.is_complete
            assert first.finish_reason == second.finish_reason == "deadline"
            assert first.usage["completion_tokens"] > 0 and second.usage["completion_tokens"] == 0
            print(f"deadlines of 1.0 and 0.3 s: {first.took_s:.2f} and {second.took_s:.2f} s")
            assert 1.0 <= first.took_s < 1.6
            assert 0.3 <= second.took_s < 0.9

    asyncio.run(crowd())


def test_a_deadline_does_not_outlive_its_request(idle: Served) -> None:
    """The same id again: what was due of the first is not due of the second."""
    first = idle.http.post(COMPLETIONS, json=story(0, 1, request_id="again", deadline_s=0.4))
    assert first.json()["choices"][0]["finish_reason"] == "length"
    begin_s = time.monotonic()
    second = idle.http.post(COMPLETIONS, json=story(0, 600, request_id="again"))
    assert second.json()["choices"][0]["finish_reason"] == "length"
    assert time.monotonic() - begin_s > 0.4, "too quick to show anything"


def test_an_id_in_use_is_refused_and_its_owner_goes_on(idle: Served) -> None:
    """Prompts of one request get ids made from its own: another client's id may be one of those."""

    async def crowd() -> None:
        async with asking(idle.url, headers=BEARER) as asker:
            batch = asker.start(story(0, 400, prompt=["one", "two"], request_id="mine", stream=True))
            await all_begun([batch])
            for request_id in ("mine", "mine-0", "mine-1"):
                refused = await asker.ask(story(1, 4, request_id=request_id))
                assert refused.status == 400, refused
                assert refused.error["param"] == "request_id"
            owner = await batch.outcome()
            assert owner.is_complete and owner.usage["completion_tokens"] == 800

    asyncio.run(crowd())


def test_an_id_may_be_used_again_at_once(idle: Served) -> None:
    """Whether a stop string ended the request before or its client left: none of its tokens reach the next one."""

    def ask(n: int, max_tokens: int, **more: Any) -> str | None:
        """The text; None while the request before is not known to have ended."""
        response = idle.http.post(COMPLETIONS, json=again(n, max_tokens, **more))
        return response.json()["choices"][0]["text"] if response.status_code == 200 else None

    def again(n: int, max_tokens: int, **more: Any) -> dict[str, Any]:
        return story(n, max_tokens, temperature=0, request_id="again", **more)

    def ask_when_free() -> str:
        found: list[str | None] = []
        eventually(lambda: found.append(ask(1, 6)) or found[-1] is not None, 5)
        return str(found[-1])

    text, expected = ask(0, 20), ask(1, 6)
    assert text is not None and expected is not None
    for _ in range(4):
        assert ask(0, 400, stop=[text[6:10]]) is not None
        assert ask_when_free() == expected
        with idle.http.stream("POST", COMPLETIONS, json=again(0, 400, stream=True)) as left:
            next(left.iter_lines())
        assert ask_when_free() == expected


def test_abort_by_id_ends_one_request(idle: Served) -> None:
    async def crowd() -> None:
        async with asking(idle.url, headers=BEARER) as asker:
            asked = [asker.start(story(0, 3000, stream=True, request_id="job-0"))]
            await all_begun(asked)
            asked.append(asker.start(story(1, 3000, request_id="job-1")))
            asked.append(asker.start({"text": "native", "rid": "job-2"}, "/generate"))
            await queued(idle, 2)
            assert await off_loop(abort, idle, rid="nobody") == 0
            for n in (1, 2, 0):
                assert await off_loop(abort, idle, rid=f"job-{n}") == 1
                found = await asked[n].outcome(2)
                assert found.status == 200
                if n != 2:
                    assert found.is_complete and found.finish_reason == "abort"
            assert await off_loop(abort, idle, rid="job-0") == 0

    asyncio.run(crowd())


def test_flush_cache_forgets_prefixes(idle: Served) -> None:
    body = {"prompt": "the same words again and again " * 20, "max_tokens": 1}

    def num_cached() -> int:
        usage = idle.http.post(COMPLETIONS, json=body).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    num_cached()
    assert num_cached() > 50
    assert idle.load()["cached_tokens_held"] > 0
    assert idle.http.post("/flush_cache").json()["num_pages_freed"] > 0
    assert idle.load()["cached_tokens_held"] == 0
    assert num_cached() == 0
    assert idle.http.get("/flush_cache").status_code == 405


def test_the_engine_has_no_network_socket(idle: Served) -> None:
    (engine,) = idle.engines()
    assert engine.net_connections("inet") == []


def test_the_key_is_asked_for_and_never_shown(idle: Served) -> None:
    with httpx.Client(base_url=idle.url) as stranger:
        assert stranger.get("/health").status_code == 200
        assert stranger.get("/").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
            for path in (COMPLETIONS, CHAT, "/generate", "/flush_cache", "/abort_request"):
                refused = stranger.post(path, json={}, headers=headers)
                assert refused.status_code == 401, path
                assert refused.json()["error"]["code"] == "invalid_api_key"
            for path in ("/v1/models", "/v1/loads", "/metrics", "/server_info", "/openapi.json"):
                assert stranger.get(path, headers=headers).status_code == 401, path
    for path in ("/server_info", "/metrics", "/"):
        assert KEY not in idle.http.get(path).text
    for process in idle.descendants():
        assert KEY not in " ".join(process.cmdline())
    assert KEY not in idle.stderr.read_text()
