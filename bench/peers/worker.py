"""One peer in a process of its own: `python -m peers.worker PEER FILE THREADS`.

It answers PROMPT with one token and writes a line that it is ready; the time from its start to that line is the
peer's time from process start to first token. Then it takes a batch a line on stdin and writes an answer a line,
all in JSON, until stdin closes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

from peers.peer import open_peer

PROMPT = "What is the capital of France?"


def main(name: str, file: str, threads: str) -> None:
    """Follows commands until stdin closes."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # What libraries print must not stand between replies.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def reply(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=replies, flush=True)

    peer = open_peer(name, file, int(threads))
    peer.generate([peer.encode(PROMPT)], 1)
    reply({"versions": peer.versions()})
    for line in sys.stdin:
        reply(dataclasses.asdict(peer.generate(**json.loads(line))))


if __name__ == "__main__":
    main(*sys.argv[1:])
