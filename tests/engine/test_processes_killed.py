"""Engines and workers killed under load: nobody waits in vain, and the server answers again."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from askers import DEAD, Outcome, asking, off_loop, outcomes, some_begun, story
from served import CHAT, LONG, NULL, REAL, Served, eventually, is_live, served

from lockstep.formats import embedded_model_path

pytestmark = pytest.mark.suite("cpu", exclusive=True)

BACK_WITHIN_S = 30.0
TOLD_WITHIN_S = 5.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("killed"), *REAL, "--max-running-requests", "12") as running:
        yield running


def kill_under_load(
    server: Served, victim: Callable[[], psutil.Process], *, num_tokens: int = 3000, num_choices: int = 1
) -> tuple[list[Outcome], float]:
    """What became of 30 requests, running and waiting, and the seconds until the last one knew."""

    async def crowd() -> tuple[list[Outcome], float]:
        async with asking(server.url) as asker:
            asked = [asker.start(story(n, num_tokens, stream=n % 3 != 0, n=num_choices)) for n in range(20)]
            for n in range(10):
                body = story(100 + n, num_tokens, stream=n % 2 == 0, n=num_choices)
                prompt = body.pop("prompt")
                asked.append(asker.start(body | {"messages": [{"role": "user", "content": prompt}]}, CHAT))
            await some_begun(asked, 4)
            begin_s = time.monotonic()
            victim().kill()
            found = await outcomes(asked, 20)
            return found, time.monotonic() - begin_s

    return asyncio.run(crowd())


def assert_each_was_told(found: list[Outcome], cause: str) -> None:
    """An error response where nothing had been sent, an error event where something had."""
    for outcome in found:
        assert outcome.broken is None, outcome
        assert outcome.error["code"] == DEAD, outcome
        assert cause in outcome.error["message"] or "restarting" in outcome.error["message"]
        if outcome.is_stream:
            assert outcome.status == 200
            assert "[DONE]" not in outcome.events
            assert [event for event in outcome.events if "error" in event] == outcome.events[-1:]
        else:
            assert outcome.status == 503
            assert int(outcome.headers["retry-after"]) >= 1
    assert any(outcome.is_stream for outcome in found) and any(not outcome.is_stream for outcome in found)


def assert_back(server: Served) -> float:
    """Seconds until the server completes a request again; it must be in order then."""
    took_s = eventually(server.answers, BACK_WITHIN_S)
    assert server.http.get("/health").status_code == 200
    assert server.is_idle()
    server.family = server.descendants()
    return took_s


def test_a_killed_engine_loses_no_request_silently_again_and_again(server: Served) -> None:
    for life in range(2):
        (before,) = server.engines()
        found, told_s = kill_under_load(server, lambda: server.engines()[0])
        assert_each_was_told(found, "the engine process ended unexpectedly (exit code -9)")
        assert told_s < TOLD_WITHIN_S
        back_s = assert_back(server)
        (after,) = server.engines()
        assert after.pid != before.pid and not is_live(before)
        assert len(list(server.tmp.glob("lockstep-*"))) == 1, "the dead engine's folder was left"
        print(f"life {life}: all {len(found)} clients told after {told_s:.2f} s, back after {back_s:.2f} s")


def test_while_it_restarts_the_server_says_so(server: Served) -> None:
    server.engines()[0].kill()
    eventually(lambda: server.http.get("/health").status_code == 503, 5, 0.005)
    for path in ("/health", "/v1/loads", "/server_info", "/health_generate"):
        answer = server.http.get(path)
        assert answer.status_code == 503, path
        assert answer.json()["error"]["code"] == DEAD and int(answer.headers["retry-after"]) >= 1
    assert server.http.get("/metrics").status_code == 200
    assert server.http.get("/v1/models").status_code == 200
    assert server.http.post("/abort_request", json={"abort_all": True}).json() == {"num_aborted": 0}
    assert_back(server)


def test_an_engine_killed_while_it_starts_is_started_again(server: Served) -> None:
    killed: set[int] = set()

    def kill_another() -> bool:
        """The one that was killed before may be listed for a while."""
        others = [each for each in server.engines() if each.pid not in killed]
        for engine in others:
            engine.kill()
            killed.add(engine.pid)
        return bool(others)

    for _ in range(3):
        eventually(kill_another, 10, 0.01)
    print(f"back after {assert_back(server):.2f} s")


def test_a_killed_worker_ends_its_engine_which_says_why(tmp_path: Path) -> None:
    with served(tmp_path, *REAL, "--tp", "2", "--max-running-requests", "12") as server:
        (worker,) = server.workers()
        found, told_s = kill_under_load(server, lambda: server.workers()[0])
        assert_each_was_told(found, "the worker process of rank 1 ended with code -9")
        back_s = assert_back(server)
        assert not is_live(worker)
        print(f"worker killed: told after {told_s:.2f} s, back after {back_s:.2f} s")
        assert told_s < TOLD_WITHIN_S

        (worker,) = server.workers()
        found, told_s = kill_under_load(server, lambda: server.engines()[0])
        assert_each_was_told(found, "the engine process ended unexpectedly (exit code -9)")
        eventually(lambda: not is_live(worker), 5)
        back_s = assert_back(server)
        print(f"its engine killed: told after {told_s:.2f} s, back after {back_s:.2f} s")
        assert told_s < TOLD_WITHIN_S
        assert len(list(server.tmp.glob("lockstep-*"))) == 1, (
            "the engine keeps its files in the server's folder"
        )

        # Idle: nothing is sent to the dead worker, yet its death is seen.
        server.workers()[0].kill()
        eventually(lambda: server.http.get("/health").status_code == 503, 5, 0.01)
        assert_back(server)
        assert "Traceback" not in server.stderr.read_text()


@pytest.mark.suite("cpu", stage="nightly", seconds=30, exclusive=True)
def test_a_killed_worker_is_noticed_without_a_collective(tmp_path: Path) -> None:
    """On the null device ranks do not wait for each other: the inputs of a step find nobody."""
    with served(tmp_path, *NULL, "--tp", "2") as server:
        found, told_s = kill_under_load(server, lambda: server.workers()[0], num_tokens=LONG, num_choices=8)
        assert_each_was_told(found, "the worker process of rank 1 ended with code -9")
        print(f"worker killed: told after {told_s:.2f} s, back after {assert_back(server):.2f} s")
        assert told_s < TOLD_WITHIN_S


@pytest.mark.suite("cpu", stage="nightly", seconds=30, exclusive=True)
def test_of_two_replicas_the_other_serves_on(tmp_path: Path) -> None:
    async def crowd(server: Served) -> list[Outcome]:
        async with asking(server.url) as asker:
            asked = [asker.start(story(n, 500, stream=n % 4 < 2)) for n in range(16)]
            await some_begun(asked, 8)
            victim = server.engines()[0]
            victim.kill()
            await off_loop(lambda: eventually(lambda: not victim.is_running(), 5, 0.01))
            begun_later = [asker.start(story(100 + n, 40, stream=n % 2 == 0)) for n in range(8)]
            later = await outcomes(begun_later)
            assert all(outcome.is_complete for outcome in later), later
            assert (await off_loop(server.load))["num_running_reqs"] > 0
            return await outcomes(asked)

    with served(tmp_path, *REAL, "--dp", "2") as server:
        assert len(server.engines()) == 2
        found = asyncio.run(crowd(server))
        completed = [outcome for outcome in found if outcome.is_complete]
        assert len(completed) == 8, "half of the requests were the other replica's"
        assert all(outcome.usage["completion_tokens"] == 500 for outcome in completed)
        assert_each_was_told([outcome for outcome in found if not outcome.is_complete], "ended unexpectedly")
        assert server.http.get("/health").status_code == 200
        eventually(lambda: len(server.engines()) == 2 and server.is_idle(), BACK_WITHIN_S)
        server.family = server.descendants()


@pytest.mark.suite("cpu", stage="nightly", seconds=30, exclusive=True)
def test_an_engine_that_cannot_come_back_is_tried_with_patience(tmp_path: Path) -> None:
    """First its model is gone, then the folder for its sockets; with both back, the server answers."""
    model = tmp_path / "model.gguf"
    model.symlink_to(embedded_model_path())
    with served(tmp_path, str(model), *NULL) as server:
        model.unlink()
        server.engines()[0].kill()
        eventually(lambda: server.http.get("/health").status_code == 503, 5)
        http_process = psutil.Process(server.process.pid)
        busy_s = sum(http_process.cpu_times()[:2])
        time.sleep(3)
        busy_s = sum(http_process.cpu_times()[:2]) - busy_s
        tries = server.stderr.read_text().count("starting it again")
        print(f"{tries} tries and {busy_s:.2f} s of the server's CPU in 3 s")
        assert 2 <= tries <= 4
        assert busy_s < 1.0
        assert "model.gguf" in server.stderr.read_text().splitlines()[-1]
        answer = server.http.post("/v1/completions", json={"prompt": "a"})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == DEAD
        assert server.http.get("/health").status_code == 503

        os.rename(server.tmp, tmp_path / "elsewhere")
        eventually(lambda: str(server.tmp) in server.stderr.read_text(), 20)
        server.tmp.mkdir()
        model.symlink_to(embedded_model_path())
        print(f"back after {assert_back(server):.2f} s")
