"""What the engine was seen to do, as a page: other programs as its clients, transformers as its judge, random traffic.

    python bench/engine_report.py                       # everything: some ten minutes on two cores
    python bench/engine_report.py greedy facts          # these parts anew; the page keeps what it had of the others
    python bench/engine_report.py --out FOLDER          # somewhere else than docs/reports/engine

Needs Lockstep with its `test` extra and the embedded model. The first run of `lm-eval` makes a virtual environment for
it in ~/.cache/lockstep-peers. Exits with 1 when a part is not as it should be.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.extend(
    str(Path(__file__).resolve().parents[1] / "tests" / room)
    for room in ("accuracy", "engine", "features", "scheduler")
)

from evidence import facts, greedy, lm_eval, openai_calls, schemas, traffic
from evidence.part import Part, verdict
from lockstep.bench.fingerprint import describe, fingerprint
from lockstep.core.errors import LockstepError
from peers.markdown import table

PARTS = {
    part.name: part
    for part in (lm_eval.PART, openai_calls.PART, greedy.PART, facts.PART, schemas.PART, traffic.PART)
}
OUT = Path(__file__).resolve().parents[1] / "docs" / "reports" / "engine"


def record(part: Part) -> dict[str, Any]:
    """Collects the part; what was found, where and when."""
    machine = fingerprint()
    devices, _, versions = describe(machine)
    begin_s = time.perf_counter()
    found = part.collect()
    return {
        "part": part.name,
        "date": datetime.date.today().isoformat(),
        "seconds": round(time.perf_counter() - begin_s, 1),
        "machine": devices,
        "versions": f"Python {machine['python']}, {versions}",
        "found": found,
    }


def page(records: Sequence[Mapping[str, Any]]) -> str:
    """The whole report in Markdown."""
    rows = [["part", "as it should be", "seconds", "findings"]]
    sections = []
    for one in records:
        part, passed = PARTS[one["part"]], verdict(one["found"]["passed"])
        rows.append([part.title, passed, f"{one['seconds']:.0f}", f"[{part.name}.json]({part.name}.json)"])
        where = f"*{one['date']}, {one['machine']}; {one['versions']}.*"
        sections.append(f"## {part.title}\n\n{part.page(one['found'])}\n\n{where}")
    head = (
        "# What the engine was seen to do\n\nMade by `python bench/engine_report.py`. The model is the embedded one, "
        "SmolLM2-135M-Instruct in Q4_1. Times are those of a machine that others used too.\n\n" + table(rows)
    )
    return "\n\n".join([head, *sections]) + "\n"


def write(out: Path, names: Sequence[str]) -> bool:
    """Collects parts, one file each, and makes the page of all that are there; whether they all passed."""
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        print(f"{PARTS[name].title} ...", flush=True)
        text = json.dumps(record(PARTS[name]), indent=1, ensure_ascii=False)
        (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    files = [path for name in PARTS if (path := out / f"{name}.json").exists()]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    (out / "README.md").write_text(page(records), encoding="utf-8")
    return all(one["found"]["passed"] for one in records)


def main() -> int:
    """The exit code: 2 when something is missing or a program failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}  [all]")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the report  [docs/reports/engine]")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.parts if name not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}: there are {', '.join(PARTS)}")
    try:
        return 0 if write(arguments.out, arguments.parts or list(PARTS)) else 1
    except LockstepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
