"""The end of a server, asked for or not: on time, and nothing is left behind."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from pathlib import Path

import httpx
import psutil
import pytest
from askers import DEAD, Outcome, asking, off_loop, some_begun, story
from served import COMMAND, NULL, REAL, Served, clean_environment, eventually, is_live, served

pytestmark = pytest.mark.suite("cpu", exclusive=True)

END_WITHIN_S = 10.0
ORPHANS_END_WITHIN_S = 5.0


async def crowd_until_the_end(server: Served, number: int) -> tuple[list[Outcome], int, float]:
    """Signals a busy server. What became of the running requests and of clients that kept asking; code, seconds."""

    async def keep_asking(first: int) -> list[Outcome]:
        found = []
        for n in range(first, first + 1000):
            found.append(await asker.ask(story(n, 5, stream=n % 2 == 0)))
            if found[-1].broken is not None:
                return found
        raise AssertionError("the server never went away")

    async with asking(server.url) as asker:
        asked = [asker.start(story(n, 5000, stream=n % 3 != 0)) for n in range(24)]
        keepers = [asyncio.create_task(keep_asking(1000 * n)) for n in range(1, 5)]
        await some_begun(asked, 8)
        code, took_s = await off_loop(lambda: server.stop(number))
        running = [await one.outcome(5) for one in asked]
        repeated = [outcome for keeper in keepers for outcome in await asyncio.wait_for(keeper, 5)]
    return running + repeated, code, took_s


@pytest.mark.parametrize(
    ("number", "options"),
    [
        (signal.SIGTERM, ()),
        (signal.SIGINT, ("--tp", "2")),
        (signal.SIGTERM, ("--dp", "2")),
    ],
    ids=["SIGTERM", "SIGINT-tp2", "SIGTERM-dp2"],
)
def test_a_signal_under_load_ends_everything(tmp_path: Path, number: int, options: tuple[str, ...]) -> None:
    with served(tmp_path, *REAL, *options) as server:
        server.family = server.descendants()
        assert len(server.family) == (2 if options else 1)
        found, code, took_s = asyncio.run(crowd_until_the_end(server, number))
        print(f"gone {took_s:.2f} s after the signal")
        assert code == 0
        assert took_s < END_WITHIN_S
        assert server.remains() == {}
        for outcome in found:
            if outcome.status == 0:
                assert isinstance(outcome.broken, httpx.TransportError)  # came after the end
            elif outcome.status == 200 and not outcome.is_complete:
                assert outcome.is_stream and outcome.error["code"] == DEAD, outcome
            elif outcome.status == 200:
                assert outcome.finish_reason == "length"
            else:
                assert outcome.status == 503 and outcome.error["code"], outcome
        assert sum(outcome.error.get("code") == DEAD for outcome in found) >= 20
        assert "Traceback" not in server.stderr.read_text()


def test_a_second_signal_changes_nothing(tmp_path: Path) -> None:
    with served(tmp_path, *NULL) as server:
        server.process.send_signal(signal.SIGINT)
        code, _ = server.stop(signal.SIGTERM)
        assert code == 0
        assert server.remains() == {}


def test_a_signal_while_the_model_loads(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    process = subprocess.Popen(
        [*COMMAND, *REAL, "--tp", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(TMPDIR=str(temporary)),
    )
    try:
        server = psutil.Process(process.pid)
        eventually(lambda: len(server.children(recursive=True)) == 2, 20, 0.01)
        family = server.children(recursive=True)
        begin_s = time.monotonic()
        process.terminate()
        said, complained = process.communicate(timeout=30)
        print(f"gone {time.monotonic() - begin_s:.2f} s after the signal")
        assert (process.returncode, said, complained) == (0, "", "")
        assert time.monotonic() - begin_s < END_WITHIN_S
        eventually(lambda: not any(is_live(child) for child in family), 2)
        assert list(temporary.iterdir()) == []
    finally:
        process.kill()


def test_a_signal_while_the_engine_restarts(tmp_path: Path) -> None:
    with served(tmp_path, *REAL) as server:
        server.engines()[0].kill()
        eventually(lambda: server.http.get("/health").status_code == 503, 5, 0.005)
        time.sleep(0.5)
        server.family = server.descendants()
        code, took_s = server.stop()
        assert code == 0 and took_s < END_WITHIN_S
        assert server.remains() == {}


def test_a_killed_server_takes_everything_along(tmp_path: Path) -> None:
    async def crowd(server: Served) -> None:
        async with asking(server.url) as asker:
            asked = [asker.start(story(n, 5000, stream=True)) for n in range(8)]
            await some_begun(asked, 4)
            server.process.kill()
            for one in asked:
                assert (await one.outcome(5)).broken is not None

    with served(tmp_path, *REAL, "--tp", "2") as server:
        server.family = server.descendants()
        assert len(server.family) == 2
        asyncio.run(crowd(server))
        server.process.wait()
        took_s = eventually(lambda: server.remains() == {}, ORPHANS_END_WITHIN_S)
        print(f"nothing left {took_s:.2f} s after the kill")
        assert "Traceback" not in server.stderr.read_text()


def test_nothing_listens_but_the_http_port(tmp_path: Path) -> None:
    with served(tmp_path, *REAL, "--tp", "2") as server:
        assert server.answers()
        sockets = {
            process: process.net_connections("inet")
            for process in (psutil.Process(server.process.pid), *server.descendants())
        }
        assert len(sockets) == 3
        http, *ranks = sockets.values()
        assert {c.laddr.port for c in http if c.status == psutil.CONN_LISTEN} == {server.port}
        assert {c.laddr.ip for c in http} == {"127.0.0.1"}
        # Ranks meet through a file; Gloo's connections between them stay inside the machine.
        assert [c for own in ranks for c in own if c.laddr.ip != "127.0.0.1"] == []
        assert any(ranks), "Gloo's own sockets were not seen, so this test sees nothing"
