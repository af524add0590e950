"""Lockstep beside llama.cpp, OpenVINO and transformers: same processor cores, same files, same tokens, in turn.

    python bench/cpu_peers.py prepare                  # once: environments, files (llama.cpp is compiled: minutes)
    python bench/cpu_peers.py all --out results        # the tables, and the loss by cpu_loss.py: twelve minutes
    python bench/cpu_peers.py run --out results        # the tables alone: ten minutes at most
    python bench/cpu_peers.py run --quick --out trial  # that everything works; its figures say nothing
    python bench/cpu_peers.py report --out results     # the tables again, from what was measured so far

Needs Linux, a C++ compiler, and Lockstep with its `bench` and `test` extras in the environment that runs this.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import cpu_loss
from cpu_loss import NUM_DECODE_TOKENS, NUM_TOKENS
from lockstep.bench.fingerprint import describe, fingerprint, was_busy
from lockstep.core.clock import SystemClock
from lockstep.core.errors import ConfigError, LockstepError
from peers.budget import rounds_within
from peers.environments import DEFAULT_CACHE, DISTRIBUTIONS, prepare_environment
from peers.files import REQUANTISED, SHAPE, SMALL, bench_model
from peers.rows import chosen_rows
from peers.tables import Results, markdown
from peers.visits import Visit, Visitor
from peers.workload import QUICK, Workload

MINUTES = {SMALL: 6.0, SHAPE: 3.5}
"""Model -> its time for rounds, by default: enough for three rounds of the small one on two cores."""
MOST_ROUNDS = 5
QUICK_LOSS = (512, 0)
VISITS, SESSION = "visits.jsonl", "session.json"


def prepare(cache: Path) -> None:
    """Environments and files of everyone, as far as they are missing."""
    for peer in DISTRIBUTIONS:
        print(f"environment of {peer} ...", flush=True)
        prepare_environment(peer, cache)
    for model in REQUANTISED:
        print(f"files of {model} ...", flush=True)
        bench_model(model, cache, make=True)


def run(arguments: argparse.Namespace) -> None:
    """Measures round by round; each visit is written down as it ends."""
    out: Path = arguments.out
    if (out / VISITS).exists():
        raise ConfigError(f"{out} holds results already: name another folder, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    if arguments.cores is not None:
        os.sched_setaffinity(0, {int(core) for core in arguments.cores.split(",")})
    threads = len(os.sched_getaffinity(0))
    machine = fingerprint()
    if was_busy(machine):
        print(f"the machine is not quiet: load {machine['load_average']:.2f}; peers suffer most", flush=True)
    session = {
        "command": shlex.join(["python", *sys.argv]),
        "quick": arguments.quick,
        "threads": threads,
        "machine": machine,
    }
    (out / SESSION).write_text(json.dumps(session, indent=2) + "\n")
    workload = QUICK if arguments.quick else Workload(seed=arguments.seed)
    for name in arguments.model or list(REQUANTISED):
        model = bench_model(name, arguments.cache)
        rows = chosen_rows(name, arguments.peer)
        for file in {model.files[row.format] for row in rows}:
            file.read_bytes()  # Nobody is to pay for the disk.
        visitor = Visitor(model, workload, threads, arguments.cache, out / "peers.log")
        minutes = MINUTES[name] if arguments.minutes is None else arguments.minutes
        for number in rounds_within(minutes * 60, arguments.rounds, SystemClock()):
            for row in rows:
                found = visitor.visit(row, number)
                with (out / VISITS).open("a") as visits:
                    print(found.as_json(), file=visits)
                print(_progress(found), flush=True)


def report(out: Path) -> bool:
    """Prints the tables and writes them as Markdown and JSON. True when nothing failed."""
    if not (out / VISITS).exists():
        raise ConfigError(f"{out} holds no results; measure with `run --out {out}`")
    visits = [Visit.from_json(line) for line in (out / VISITS).read_text().splitlines()]
    session: dict[str, Any] = json.loads((out / SESSION).read_text())
    models = [Results(name, visits) for name in REQUANTISED if any(visit.model == name for visit in visits)]
    machine = [*describe(session["machine"]), f"{session['threads']} threads", f"`{session['command']}`"]
    if session["quick"]:
        machine.append("tiny counts: these figures say nothing")
    text = "\n\n".join([*map(markdown, models), "\n".join(f"- {line}" for line in machine)]) + "\n"
    (out / "report.md").write_text(text)
    results = {found.model: found.as_json() for found in models}
    (out / "report.json").write_text(json.dumps({**session, "results": results}, indent=2) + "\n")
    print(text)
    return all(visit.error is None for visit in visits)


def _progress(visit: Visit) -> str:
    figures = ", ".join(f"{key} {sorted(values)[len(values) // 2]:.4g}" for key, values in visit.values.items())
    problem = f"; FAILED: {visit.error}" if visit.error else ""
    lost = f"others {visit.lost_cores:.2f} cores"
    head = f"{time.strftime('%H:%M:%S')} {visit.model} round {visit.round_number}"
    return f"{head} {visit.row}: {figures} ({visit.seconds:.0f} s, {lost}){problem}"


def _parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("prepare", "all", "run", "report"):
        command = commands.add_parser(name)
        command.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="environments and files")
        if name != "prepare":
            command.add_argument("--out", type=Path, required=True, help="folder of the results")
        if name in ("all", "run"):
            _add_run_options(command)
    return parser.parse_args(words)


def _add_run_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", action="append", choices=list(REQUANTISED), help="may be repeated  [all]")
    command.add_argument("--peer", action="append", metavar="WHO", help="may be repeated  [all]")
    command.add_argument("--minutes", type=float, help="for each model; a round that begins is ended")
    command.add_argument("--rounds", type=int, default=MOST_ROUNDS, help=f"at most  [{MOST_ROUNDS}]")
    command.add_argument("--cores", metavar="0,1", help="processor cores of everyone  [all allowed]")
    command.add_argument("--seed", type=int, default=0, help="of the prompts")
    command.add_argument("--quick", action="store_true", help="tiny counts, to see that everything works")


def main() -> int:
    """The exit code: 1 when a peer failed, 2 on bad usage."""
    arguments = _parse()
    try:
        if arguments.command == "prepare":
            prepare(arguments.cache)
            return 0
        if arguments.command in ("all", "run"):
            run(arguments)
        succeeded = report(arguments.out)
        if arguments.command == "all":
            count, decode_count = QUICK_LOSS if arguments.quick else (NUM_TOKENS, NUM_DECODE_TOKENS)
            text = cpu_loss.measure(
                arguments.out, cache=arguments.cache, num_tokens=count, num_decode_tokens=decode_count
            )
            print(text)
        return 0 if succeeded else 1
    except LockstepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
