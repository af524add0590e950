"""A measured operator as a picture, from its JSON."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lockstep.core.errors import ConfigError


def require_plotting() -> None:
    """Raises ConfigError where the package that draws is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib; run: pip install 'lockstep-engine[bench]'")


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Writes the PNG of a report of `ops bench`: a line for each provider over the sizes, and the machine's limit.

    Providers without a single measurement are in the legend, as not run or as wrong.

    Raises ConfigError when nothing was measured, or when the file cannot be written.
    """
    require_plotting()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = report["results"]
    measurements = results["measurements"]
    if not measurements:
        raise ConfigError(f"no provider of {results['op']} was timed, so there is nothing to draw")
    has_flops = results["limits"]["flops_per_s"] is not None
    rate, unit, scale = ("flops_per_s", "TFLOP/s", 1e12) if has_flops else ("bytes_per_s", "GB/s", 1e9)

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for provider in dict.fromkeys(each["provider"] for each in measurements):
        mine = [each for each in measurements if each["provider"] == provider]
        axes.plot([each["size"] for each in mine], [each[rate] / scale for each in mine], "o-", label=provider)
    for label in _absent(results):
        axes.plot([], [], " ", label=label)
    limit = results["limits"][rate] / scale
    source = "a product" if has_flops else results["limits"]["bytes_per_s_from"]
    axes.axhline(limit, color="black", linestyle="--", linewidth=1, label=f"limit, {source}: {limit:.4g}")
    axes.set(xscale="log", ylabel=unit, xlabel=results["axis"], title=f"{results['op']} on {_machine(report)}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise ConfigError(f"--plot {path} cannot be written: {error.strerror or error}") from None


def _absent(results: Mapping[str, Any]) -> list[str]:
    """Such as "aiter: not run", of every provider that no size was timed with."""
    timed = {each["provider"] for each in results["measurements"]}
    outcomes = {who.partition(" at ")[0]: "not run" for who in results["not_run"]}
    outcomes |= {who.partition(" at ")[0]: "wrong" for who in results["wrong"]}
    return [f"{provider}: {outcome}" for provider, outcome in outcomes.items() if provider not in timed]


def _machine(report: Mapping[str, Any]) -> str:
    return str(report["workload"]["device"])
