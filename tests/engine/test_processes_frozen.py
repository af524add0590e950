"""An engine that is alive but does not answer: it is noticed, it is not killed, and a server ends without it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
from askers import asking, off_loop, some_begun, story
from served import NULL, served

from lockstep.core.errors import EngineDead
from lockstep.core.output import EngineStats
from lockstep.engine import process_client
from lockstep.engine.messages import Reply
from lockstep.engine.process_client import ProcessClient

pytestmark = pytest.mark.suite("cpu", exclusive=True)

CLOSES_WITHIN_S = 4.0


async def becomes(client: ProcessClient, responsive: bool) -> None:
    end_s = time.monotonic() + 5
    while client.is_responsive is not responsive:
        assert time.monotonic() < end_s, f"is_responsive did not become {responsive}"
        await asyncio.sleep(0.05)


def test_silence_is_noticed_and_forgiven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_client, "SILENCE_S", 1.0)
    monkeypatch.setattr(process_client, "PING_INTERVAL_S", 0.2)
    monkeypatch.setattr(process_client, "STATS_TIMEOUT_S", 0.5)

    async def scene() -> None:
        client = ProcessClient({"device": "null"})
        await client.start()
        try:
            await asyncio.sleep(2)
            assert client.is_responsive, "an idle engine answers pings"
            (pid,) = client.engine_pids
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(EngineDead, match="did not answer"):
                await client.stats()
            await becomes(client, False)
            assert client.is_alive and client.engine_pids == [pid]
            os.kill(pid, signal.SIGCONT)
            await becomes(client, True)
            assert (await client.stats()).uptime_s > 0
            os.kill(pid, signal.SIGSTOP)
            await becomes(client, False)
        finally:
            begin_s = time.monotonic()
            await client.close()
        assert time.monotonic() - begin_s < CLOSES_WITHIN_S

    asyncio.run(scene())


def test_a_long_step_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(process_client.time, "monotonic", lambda: now_s)
    seat = process_client._Seat()
    monkeypatch.setattr(process_client._Seat, "is_open", True)
    seat.hear(Reply(1, stats=EngineStats(last_step_s=8.0)))
    for passed_s, expected in ((11.0, True), (31.0, True), (33.0, False)):
        now_s = 100.0 + passed_s
        assert seat.is_responsive is expected, passed_s


def test_a_server_with_a_frozen_engine(tmp_path: Path) -> None:
    with served(tmp_path, *NULL) as server:
        before = server.http.get("/metrics").text
        assert "lockstep_engine_up 1.0" in before

        async def crowd() -> tuple[int, float]:
            async with asking(server.url) as asker:
                asked = [asker.start(story(n, 5000, stream=True)) for n in range(3)]
                await some_begun(asked, 3)
                server.engines()[0].suspend()
                for path in ("/v1/loads", "/server_info"):
                    begin_s = time.monotonic()
                    refused = await asker.http.get(path)
                    assert (refused.status_code, time.monotonic() - begin_s < 4) == (503, True)
                after = (await asker.http.get("/metrics")).text
                assert "lockstep_engine_up 0.0" in after
                (pages,) = [line for line in before.splitlines() if line.startswith("lockstep_kv_pages_total ")]
                assert pages in after
                code, took_s = await off_loop(lambda: server.stop(signal.SIGTERM))
                for one in asked:
                    assert (await one.outcome(5)).error["code"] == "engine_dead"
                return code, took_s

        code, took_s = asyncio.run(crowd())
        said = server.stderr.read_text()
        assert (code, server.remains()) == (0, {})
        assert took_s < CLOSES_WITHIN_S
        assert "Traceback" not in said
        assert [line for line in said.splitlines() if "stopping" in line] == [
            "stopping; 3 unfinished requests end with an error"
        ]
