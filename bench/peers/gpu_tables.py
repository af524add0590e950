"""Two engines' results for the same model side by side, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.bench.report import shown
from peers.markdown import table

Result = Mapping[str, Any]
"""What one run wrote: engine, engine_version, model, startup, tests."""


@dataclass(frozen=True)
class Figure:
    """One figure of a kind of test. `key` names it; a dot leads into what a test lists under a name."""

    key: str
    title: str
    higher_is_better: bool
    percent: bool = False

    def shown(self, value: float) -> str:
        return f"{value:.0%}" if self.percent else shown(value)

    def advantage(self, own: float, peer: float) -> float:
        """How many times better our figure is."""
        return own / peer if self.higher_is_better else peer / own


FIGURES = {
    "throughput": (Figure("output_tokens_per_s", "output tokens/s", True),),
    "decode": (
        Figure("ms_per_step", "ms a step", False),
        Figure("fraction_of_weight_kv_floor", "share of the floor", True, percent=True),
        Figure("first_token_s", "s to the first tokens", False),
        Figure("output_tokens_per_s", "output tokens/s, prompts included", True),
    ),
    "prefill": (
        Figure("input_tokens_per_s", "input tokens/s", True),
        Figure("mfu_datasheet", "share of the card's operations", True, percent=True),
    ),
    "prefix": (
        Figure("median_s", "s, cache empty", False),
        Figure("primed_median_s", "s, prefix cached", False),
    ),
    "serving": (
        Figure("ttft_ms.median", "ms to the first token, p50", False),
        Figure("ttft_ms.p99", "ms to the first token, p99", False),
        Figure("itl_ms.median", "ms between tokens, p50", False),
        Figure("itl_ms.p99", "ms between tokens, p99", False),
        Figure("output_tokens_per_s", "output tokens/s", True),
    ),
}
START = Figure("process_start_to_first_token_s", "s to the first token", False)


def figure_of(test: Mapping[str, Any], key: str) -> float | None:
    """A test's figure, None where it has none."""
    found: Any = test
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found if isinstance(found, (int, float)) else None


def merged(results: Sequence[Result]) -> list[Result]:
    """Results of the same engine, model and tag as one: all of their tests, and the rest of the first."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for result in results:
        key = (result["engine"], result["model"], result.get("tag", ""))
        kept = found.setdefault(key, {**result, "tests": {}})
        kept["tests"].update(result["tests"])
    return list(found.values())


def markdown(own: Sequence[Result], peers: Sequence[Result]) -> str:
    """A section for each model that we ran, beside every result of a peer for it."""
    sections = []
    for result in merged(own):
        rivals = [peer for peer in merged(peers) if peer["model"] == result["model"]]
        sections += [_section(result, rival) for rival in rivals] or [_section(result, None)]
    return "\n\n".join(sections)


def _section(own: Result, peer: Result | None) -> str:
    name = _name(peer) if peer is not None else "no peer"
    lines = [["test", "figure", name, _name(own), "times better"]]
    lines += _start(own, peer)
    for test, figures in own["tests"].items():
        lines += _test(test, figures, peer["tests"].get(test) if peer is not None else None)
    return f"## {own['model']}{_tag(own)}\n\n{table(lines)}"


def _start(own: Result, peer: Result | None) -> list[list[str]]:
    startup = own.get("startup", {})
    other = peer.get("startup", {}) if peer is not None else {}
    if START.key not in startup:
        return []
    state = startup.get("cache_state", "-")
    # A start with full caches is no match for one with empty ones.
    alike = other if other.get("cache_state", "-") == state else {}
    return [_row(f"process start (caches {state})", START, startup, alike)]


def _test(name: str, own: Result, peer: Result | None) -> list[list[str]]:
    if "error" in own or "skipped" in own:
        return [[name, "", "", str(own.get("error", own.get("skipped"))), ""]]
    if peer is not None and ("error" in peer or "skipped" in peer):
        peer = None
    # A peer's client that loaded both servers notes no checksum: its requests are its own.
    if peer is not None and peer.get("digest") != own.get("digest"):
        return [[name, "", "", "not the same requests: the digests differ", ""]]
    has = [figure for figure in FIGURES[own["kind"]] if figure_of(own, figure.key) is not None]
    return [_row(name, figure, own, peer or {}) for figure in has]


def _row(name: str, figure: Figure, own: Result, peer: Result) -> list[str]:
    value, other = figure_of(own, figure.key), figure_of(peer, figure.key)
    assert value is not None
    if not other:
        return [name, figure.title, "", figure.shown(value), ""]
    advantage = figure.advantage(value, other)
    return [name, figure.title, figure.shown(other), figure.shown(value), f"{advantage:.2f}"]


def _name(result: Result) -> str:
    return f"{result['engine']} {result.get('engine_version', '')}".strip()


def _tag(result: Result) -> str:
    return f" ({result['tag']})" if result.get("tag") else ""
