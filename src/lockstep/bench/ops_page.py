"""A measured operator as Markdown, from its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lockstep.bench.fingerprint import describe
from lockstep.bench.report import shown


def markdown(report: Mapping[str, Any], *, picture: str | None = None) -> str:
    """A section of a page from a report of `ops bench`: a table of all sizes and providers, then the notes.

    `picture` is the path of its plot beside the page.
    """
    results = report["results"]
    has_flops = results["limits"]["flops_per_s"] is not None
    titles = [
        results["axis"],
        "provider",
        "microseconds (min - max)",
        "GB/s",
        *["TFLOP/s"] * has_flops,
        "of limit",
    ]
    reference = {each["size"]: each for each in results["measurements"] if each["provider"] == "reference"}
    lines = [f"## {results['op']}", "", f"{report['model']['name']}.", ""]
    lines += [f"![{results['op']} over its sizes]({picture})", ""] if picture else []
    lines += [_row([*titles, "speedup"]), _row(["---"] * (len(titles) + 1))]
    for each in results["measurements"]:
        seconds = each["seconds"]
        best, middle, worst = (seconds[key] * 1e6 for key in ("min", "median", "max"))
        base = reference.get(each["size"])
        cells = [
            str(each["size"]),
            each["provider"],
            f"{shown(middle)} ({shown(best)} - {shown(worst)})",
            shown(each["bytes_per_s"] / 1e9),
            *([shown(each["flops_per_s"] / 1e12)] if has_flops else []),
            f"{each['share_of_limit']:.0%}{', fits the cache' * each['fits_cache']}",
            f"{base['seconds']['median'] / seconds['median']:.2f}" if base else "",
        ]
        lines.append(_row(cells))
    notes = [*report["notes"], *describe(report["machine"]), f"`{report['command']}`"]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
