"""Every native kernel against its operator's contract, with each instruction set of this processor forced in turn.

    python scripts/instruction_sets.py > docs/reports/cpu-instruction-sets.md

Runs `lockstep ops check --platform cpu --kernel native_SET` for each set and prints one table. Where the processor has
AVX-512 with bfloat16 and no AMX, the kernels of AMX run too, on tiles that are emulated: that wants cmake, a compiler
and nanobind, and builds in build/emulated. Exits 1 when a check fails.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from lockstep.bench.fingerprint import describe, fingerprint
from lockstep.native import usable_instruction_sets, why_not

ROOT = Path(__file__).parents[1]
EMULATED = ROOT / "build" / "emulated"


def main() -> int:
    usable = usable_instruction_sets()
    if not usable:
        sys.exit(f"no native kernels: {why_not()}")
    seed = secrets.randbelow(2**31)
    found: dict[str, dict[str, Any]] = {}
    if "avx512_bf16" in usable and "amx" not in usable:
        found["amx, emulated"] = checked("amx", seed, build_emulated())
    for name in usable:
        found[name] = checked(name, seed, None)
    print(page(found, seed))
    return 0 if all(result["passed"] for result in found.values()) else 1


def build_emulated() -> Path:
    """A folder with the package and an extension whose AMX is emulated, for the path of modules."""
    options = ("-DLOCKSTEP_EMULATE_AMX=ON", f"-DPython_EXECUTABLE={sys.executable}")
    for command in (("-S", ROOT, "-B", EMULATED, *options), ("--build", EMULATED, "--parallel")):
        subprocess.run(("cmake", *command), check=True, stdout=sys.stderr)
    site = EMULATED / "site"
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(ROOT / "src", site, ignore=shutil.ignore_patterns("_native*.so", "__pycache__"))
    for extension in (EMULATED / "native").glob("_native*.so"):
        shutil.copy(extension, site / "lockstep" / "native")
    return site


def checked(name: str, seed: int, site: Path | None) -> dict[str, Any]:
    """What the command says of one instruction set, of the installed extension or the one in `site`."""
    print(f"== {name}{' on emulated tiles' if site else ''}", file=sys.stderr)
    command = (*("-m", "lockstep.cli.main", "ops", "check", "--platform", "cpu"), "--kernel", f"native_{name}")
    done = subprocess.run(
        (sys.executable, *command, "--seed", str(seed), "--json"),
        env={**os.environ, **({"PYTHONPATH": str(site)} if site else {})},
        stdout=subprocess.PIPE,
        text=True,
    )
    if not done.stdout:
        sys.exit(f"the check of native_{name} gave no result")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def page(found: dict[str, dict[str, Any]], seed: int) -> str:
    """The report in Markdown, from each set's results."""
    operators = {name: {each["op"]: each for each in result["operators"]} for name, result in found.items()}
    rows = []
    for op, first in next(iter(operators.values())).items():
        mutants = first["mutants"]
        cells = [cell(each[op]["kernels"]) for each in operators.values()]
        rows.append((op, f"{mutants['rejected']} of {mutants['total']}", *cells))
    titles = ("operator", "mutants rejected", *found)
    table = [titles, ("---",) * len(titles), *rows]
    verdicts = (f"{name} {'passed' if result['passed'] else 'FAILED'}" for name, result in found.items())
    return "\n".join(
        (
            "# Native kernels, each instruction set",
            "",
            "Each cell: the largest error as a share of what the contract accepts, of how many cases. An operator's",
            "mutants are known-wrong versions of it, and a contract's tolerances reject them. Errors are alike where",
            "the rounding of results to 16 bits, or of what products read to 8, outweighs the order of sums.",
            "",
            *(f"| {' | '.join(row)} |" for row in table),
            "",
            f"- {', '.join(verdicts)}",
            *(f"- {line}" for line in describe(fingerprint())),
            f"- `python scripts/instruction_sets.py`, which ran `lockstep ops check --platform cpu --seed {seed}` "
            "with `--kernel native_SET` for each",
        )
    )


def cell(kernels: list[dict[str, Any]]) -> str:
    if not kernels:
        return "not run"
    (kernel,) = kernels
    if not kernel["passed"]:
        return f"FAILED, {len(kernel['failures'])} of {kernel['cases']}"
    return f"{kernel['worst_share']:.2f} of {kernel['cases']}"


if __name__ == "__main__":
    sys.exit(main())
