"""Joins what the parts of a run measured with what is known, and says which times are still estimates.

    python scripts/ci/join_durations.py reports durations.json >> "$GITHUB_STEP_SUMMARY"

`reports` holds the report folders of the parts at any depth. The file is written as `.ci/durations.json` wants it:
commit it when it has drifted. Exits 1 when no part measured anything.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from lockstep.ci.parts import Durations, load_durations
from lockstep.ci.project import EVERY_STAGE, STAGES, open_project
from lockstep.ci.registry import Registry, load_registry
from lockstep.ci.reports import DURATIONS_NAME


def unmeasured(registry: Registry, durations: Durations) -> Iterator[str]:
    """Suite by suite, in a sentence, the jobs that no run has measured."""
    for suite in registry.project.suites:
        targets = [
            job.target
            for stage in STAGES
            for job in registry.jobs([suite], stage, durations)
            if durations.get(suite, job.target, stage) is None
        ]
        if targets:
            yield f"{suite}: {len(targets)} never measured: {', '.join(dict.fromkeys(targets))}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path)
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    registry = load_registry(open_project(Path.cwd()))
    durations = load_durations(registry.project.durations_path)
    found = [load_durations(path) for path in sorted(given.reports.rglob(DURATIONS_NAME))]
    for part in found:
        durations.update(part)
    jobs = registry.jobs(registry.project.suites, EVERY_STAGE, durations)
    durations.keep_only((job.suite, job.target) for job in jobs)
    durations.save(given.output)
    print(f"## Durations\n\n- {sum(part.num_times for part in found)} times measured by {len(found)} parts")
    for sentence in unmeasured(registry, durations):
        print(f"- {sentence}")
    return 0 if any(part.num_times for part in found) else 1


if __name__ == "__main__":
    sys.exit(main())
