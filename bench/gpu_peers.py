"""Lockstep on one GPU under workloads that other engines run too, and the results of both side by side.

    python bench/gpu_peers.py ours --workloads FILE --model NAME --out ours.json
    python bench/gpu_peers.py serve --workloads FILE --model NAME --out served.json
    python bench/gpu_peers.py report --ours ours.json served.json --peer vllm.json

FILE lists models and requests (`peers/gpu_workloads.py` says how). The models have random weights, made on the device
from a config.json alone; prompts are token ids. `ours` measures in one process, `serve` a server of its own over HTTP.
The JSON is written anew after every test, so a run that is cut off keeps what it had. A test that fails or takes too
long is noted, and a new process goes on with the next one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BEGIN_S = time.time()

from lockstep import __version__  # noqa: E402 - what importing takes is part of what is measured
from lockstep.core.errors import LockstepError  # noqa: E402
from peers.gpu_record import Record  # noqa: E402
from peers.gpu_tables import markdown  # noqa: E402
from peers.gpu_targets import goals_table  # noqa: E402
from peers.gpu_workloads import WorkloadFile  # noqa: E402

H100_FLOPS_PER_S = 989.4e12
"""Dense bfloat16 products of an H100 SXM, by NVIDIA's datasheet."""
RATES = (16.0, float("inf"))


def ours(arguments: argparse.Namespace) -> None:
    """Measures test after test; a process whose test failed is replaced by another for what is left."""
    file = WorkloadFile(arguments.workloads)
    names = file.names() if arguments.tests is None else [name for name in arguments.tests.split(",") if name]
    for name in names:
        file.require(name)
    arguments.out.unlink(missing_ok=True)
    head = {"engine": "lockstep", "engine_version": __version__, "model": arguments.model, "tag": arguments.tag}
    Record(arguments.out, **head).save()
    worker = [
        sys.executable,
        __file__,
        "work",
        *arguments.given,
        "--until",
        str(time.time() + arguments.budget_s),
    ]
    left, is_first = names, True
    while left or is_first:
        code = subprocess.call([*worker, "--tests", ",".join(left)])
        before, left, is_first = left, Record(arguments.out).missing(names), False
        if code != 0 and left == before:
            raise LockstepError(f"the engine did not start: its process ended with exit code {code}")
    print("DONE", arguments.model, flush=True)


def work(arguments: argparse.Namespace) -> int:
    """Measures in this process what is in the record yet."""
    from peers.gpu_worker import work as measure

    arguments.tests = [name for name in arguments.tests.split(",") if name]
    return 0 if measure(arguments, BEGIN_S) else 1


def serve(arguments: argparse.Namespace) -> None:
    """Loads a server with requests that arrive at random times."""
    from peers.gpu_server import serve as measure

    arguments.out.unlink(missing_ok=True)
    head = {"engine": "lockstep", "engine_version": __version__, "model": arguments.model, "tag": arguments.tag}
    Record(arguments.out, **head, engine_kwargs=arguments.engine_args).save()
    measure(arguments)
    print("DONE serve", arguments.model, flush=True)


def report(arguments: argparse.Namespace) -> None:
    """Prints what is reached of the goals, then the tables, and writes them too if told where."""
    own, peers = (
        [json.loads(path.read_text()) for path in paths] for paths in (arguments.ours, arguments.peer)
    )
    text = f"{goals_table(own, peers)}\n\n{markdown(own, peers)}"
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="{ours,serve,report}")
    _add_measuring(commands.add_parser("ours", help=ours.__doc__), ours)
    worker = commands.add_parser("work")
    _add_measuring(worker, work)
    worker.add_argument("--until", type=float, required=True)
    server = commands.add_parser("serve", help=serve.__doc__)
    _add_common(server, serve)
    server.add_argument("--rates", type=_rates, default=RATES, help="Requests/s, with commas between.")
    server.add_argument("--client", type=Path, metavar="FILE", help="A peer's runner that loads servers too.")
    table = commands.add_parser("report", help=report.__doc__)
    table.set_defaults(do=report)
    table.add_argument("--ours", type=Path, nargs="+", required=True, help="JSON of `ours` and `serve`.")
    table.add_argument("--peer", type=Path, nargs="*", default=[], help="JSON of others, of the same shape.")
    table.add_argument("--out", type=Path, help="Markdown to write.")
    return parser


def _add_common(parser: argparse.ArgumentParser, do: Any) -> None:
    parser.set_defaults(do=do)
    parser.add_argument(
        "--workloads", type=Path, required=True, help="The file that lists models and requests."
    )
    parser.add_argument("--model", required=True, help="Its name in that file.")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write.")
    parser.add_argument("--tag", default="", help="What to tell this run from others by.")
    parser.add_argument(
        "--engine-args", type=json.loads, default={}, metavar="JSON", help="Options of the engine."
    )
    parser.add_argument(
        "--cache-state", default="unknown", help="Whether compiled kernels were there: cold, warm."
    )
    parser.add_argument("--limit-s", type=float, default=180.0, help="Time for one test, or for the start.")


def _add_measuring(parser: argparse.ArgumentParser, do: Any) -> None:
    _add_common(parser, do)
    parser.add_argument("--tests", help="Names, with commas between; omitted: all; empty: the start alone.")
    parser.add_argument("--ceilings", type=Path, metavar="JSON", help="What a probe measured on the card.")
    parser.add_argument(
        "--datasheet-flops", type=float, default=H100_FLOPS_PER_S, help="Operations/s by the datasheet."
    )
    parser.add_argument("--budget-s", type=float, default=1e9, help="Time after which no test begins.")


def _rates(text: str) -> tuple[float, ...]:
    return tuple(float(rate) for rate in text.split(","))


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(given)
    arguments.given = given[1:]
    try:
        return int(arguments.do(arguments) or 0)
    except (LockstepError, OSError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
