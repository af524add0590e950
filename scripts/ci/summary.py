"""Joins the reports of all jobs into one page, and fails when a planned part has no good report.

    python scripts/ci/summary.py reports --needs needs.json >> "$GITHUB_STEP_SUMMARY"

`reports` holds a folder report-SUITE-ID for each part, as `lockstep suites run --report-dir` wrote it, or the files of
the only one. `needs.json` is
the workflow's `needs`: outcomes of the jobs, and the matrices that the plan gave out. A skipped job is fine only where
its matrix is empty, so a green page never stands for tests that did not run. Exits 1 when anything is missing or wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PLAN = "plan"
LEFT_OUT = "left_out"


def faults(needs: Mapping[str, Any], reports: Path) -> Iterator[str]:
    """What is wrong, in sentences: jobs that failed, jobs that should have run, parts without a report."""
    planned = _planned(needs)
    for job, state in needs.items():
        if state["result"] == "skipped":
            if job not in planned or planned[job]:
                yield f"job {job} did not run"
        elif state["result"] != "success":
            yield f"job {job}: {state['result']}"
    for platform, parts in planned.items():
        if platform not in needs:
            yield f"platform {platform} has no job"
        for part in parts:
            if not _page_of(reports, part, planned).is_file():
                yield f"suite {part['suite']}, part {part['number']} of {part['total']}: no report"


def page(needs: Mapping[str, Any], reports: Path) -> Iterator[str]:
    """The page in Markdown: faults first, then what was left out, then each part's own summary."""
    found = list(faults(needs, reports))
    planned = _planned(needs)
    yield f"# {'Failed' if found else 'Passed' if any(planned.values()) else 'No suite was run'}\n"
    yield from (f"- {fault}" for fault in found)
    for sentence in json.loads(needs.get(PLAN, {}).get("outputs", {}).get(LEFT_OUT) or "[]"):
        yield f"- left out: {sentence}"
    for parts in planned.values():
        for part in parts:
            file = _page_of(reports, part, planned)
            if file.is_file():
                yield f"\n## {part['suite']}, part {part['number']} of {part['total']}\n"
                yield file.read_text("utf-8").strip()


def _page_of(reports: Path, part: Mapping[str, Any], planned: Mapping[str, Sequence[Any]]) -> Path:
    """The summary of a part. What downloads the reports gives them folders only where there are several."""
    folder = reports / f"report-{part['suite']}-{part['id']}"
    is_alone = sum(map(len, planned.values())) == 1
    return (reports if is_alone and not folder.is_dir() else folder) / "summary.md"


def _planned(needs: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    outputs = needs.get(PLAN, {}).get("outputs", {})
    return {name: json.loads(text or "[]") for name, text in outputs.items() if name != LEFT_OUT}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path)
    parser.add_argument("--needs", type=Path, required=True)
    given = parser.parse_args()
    needs = json.loads(given.needs.read_text("utf-8"))
    print("\n".join(page(needs, given.reports)))
    found = list(faults(needs, given.reports))
    print("\n".join(found), file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
