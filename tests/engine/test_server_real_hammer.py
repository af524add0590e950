"""Ten seconds of random requests: every answer well-formed, and afterwards nothing is left in the engine."""

from __future__ import annotations

import asyncio
import random
import re
from pathlib import Path

import pytest
from hammer import strike
from served import NULL, REAL, Served, eventually, served

pytestmark = pytest.mark.suite("cpu")

TIGHT = [
    "--max-running-requests",
    "10",
    "--max-queued-requests",
    "12",
    "--context-length",
    "1200",
    "--max-total-tokens",
    "1200",
]
"""Little of everything, so that requests wait, are refused and lose their pages to others."""


def assert_clean(server: Served) -> None:
    """Nothing runs, waits or holds a page; the engine is the one that was started; its cache can be emptied."""
    eventually(server.is_idle, 10)
    assert server.engines() == server.family
    server.http.post("/flush_cache")
    load = server.load()
    assert (load["num_used_tokens"], load["cached_tokens_held"]) == (0, 0)
    for name in ("lockstep_requests_running", "lockstep_requests_waiting"):
        found = re.search(rf"^{name}\S* (\S+)$", server.http.get("/metrics").text, re.MULTILINE)
        assert found is None or float(found[1]) == 0
    assert server.answers()
    complaints = [line for line in server.stderr.read_text().splitlines() if "native kernels" not in line]
    assert not complaints


@pytest.mark.parametrize(
    ("options", "seconds"), [(NULL, 3), ((*REAL, *TIGHT), 7)], ids=["null", "embedded-tight"]
)
def test_random_requests_leave_nothing_behind(tmp_path: Path, options: tuple[str, ...], seconds: int) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    with served(tmp_path, *options) as server:
        tally = asyncio.run(strike(server.url, seed, seconds, at_least=40, has_model=options != NULL))
        print(dict(tally.endings), "preemptions:", server.load()["num_preemptions"])
        assert not tally.wrong, tally.wrong[0]
        assert {"whole", "stream", "left", "refused"} <= set(tally.endings)
        assert_clean(server)
