"""Turns the plan of the suites into job matrices, one for each platform, as lines of a GitHub output file.

    lockstep suites plan --stage per-commit --json > plan.json
    lockstep suites affected --base origin/main --json > affected.json
    python scripts/ci/matrix.py plan.json --affected affected.json --runners "cpu sim" >> "$GITHUB_OUTPUT"

Each line is NAME=JSON: for a platform, a list with one object for each part of each suite; `left_out`, a list of
sentences about the suites that get no job. Exits 5 when a suite has no test in a stage that must not be empty.
Needs the package's sources (PYTHONPATH=src) and msgspec.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from lockstep.ci.project import Project, Suite, open_project
from lockstep.core.errors import ConfigError, nearest

HOSTED = "ubuntu-24.04"
HOSTED_PLATFORMS = ("cpu", "sim")
"""Platforms that need no device, so a machine of the service will do."""
MAY_BE_EMPTY = "nightly"
NOTHING_SELECTED = 5


def matrices(
    project: Project,
    plans: Iterable[Mapping[str, Any]],
    touched: Collection[str] | None,
    runners: Collection[str],
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Platform to its parts, and what is left out with the reason.

    `touched` None takes every suite. `runners` are the platforms that have machines. Raises ConfigError when one of
    them is no platform, or when a suite of the project has no plan: it would be run by no job.
    """
    platforms = {suite.platform for suite in project.suites.values()}
    for name in runners:
        if name not in platforms:
            raise ConfigError(f"no suite runs on platform {name!r}{nearest(name, platforms)}")
    by_suite = {plan["suite"]: plan for plan in plans}
    found: dict[str, list[dict[str, Any]]] = {platform: [] for platform in sorted(platforms)}
    left_out = []
    for name, suite in project.suites.items():
        if name not in by_suite:
            raise ConfigError(f"suite {name} has no plan")
        reason = _why_not(by_suite[name], suite, touched, runners)
        if reason is None:
            found[suite.platform] += _parts(by_suite[name], suite)
        else:
            left_out.append(f"{name}: {reason}")
    return found, left_out


def runner_of(suite: Suite) -> list[str]:
    """Labels of a machine that can run the suite."""
    if suite.platform in HOSTED_PLATFORMS:
        return [HOSTED]
    return ["self-hosted", suite.platform, f"devices-{suite.devices}"]


def _why_not(
    plan: Mapping[str, Any], suite: Suite, touched: Collection[str] | None, runners: Collection[str]
) -> str | None:
    if not plan["parts"]:
        return f"no test in stage {plan['stage']}"
    if touched is not None and suite.name not in touched:
        return "not touched by the change"
    return None if suite.platform in runners else f"no machine with platform {suite.platform}"


def _parts(plan: Mapping[str, Any], suite: Suite) -> list[dict[str, Any]]:
    total = plan["total_partitions"]
    return [
        {
            "suite": suite.name,
            "id": part["partition_id"],
            "number": part["partition_id"] + 1,
            "total": total,
            "runner": runner_of(suite),
        }
        for part in plan["parts"]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="output of `lockstep suites plan --json`")
    parser.add_argument(
        "--affected", type=Path, help="output of `lockstep suites affected --json`; all without it"
    )
    parser.add_argument(
        "--runners", required=True, help="platforms that have machines, with spaces between them"
    )
    given = parser.parse_args()
    plans = json.loads(given.plan.read_text("utf-8"))
    touched = None
    if given.affected is not None:
        touched = {suite["name"] for suite in json.loads(given.affected.read_text("utf-8"))["suites"]}
    empty = [plan["suite"] for plan in plans if not plan["parts"] and plan["stage"] != MAY_BE_EMPTY]
    if empty:
        print(f"no test in suite {', '.join(empty)}: give it tests or remove it", file=sys.stderr)
        return NOTHING_SELECTED
    try:
        found, left_out = matrices(open_project(Path.cwd()), plans, touched, given.runners.split())
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    for name, value in (*found.items(), ("left_out", left_out)):
        print(f"{name}={json.dumps(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
