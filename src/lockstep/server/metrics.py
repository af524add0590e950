"""Prometheus metrics of one server. Each app has its own registry, so two apps in one process do not mix."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from lockstep.core.output import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_INTER_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_E2E_BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

_GAUGES = {
    "running_requests": ("num_running", "Sequences that take part in steps."),
    "waiting_requests": ("num_waiting", "Sequences that wait to be admitted."),
    "kv_pages_total": ("num_pages_total", "Pages of the KV pool."),
    "kv_pages_used": ("num_pages_in_use", "Pages that running sequences hold."),
    "kv_pages_cached": ("num_pages_cached", "Pages kept for prefix hits that nobody holds."),
    "host_pages_total": ("num_host_pages_total", "Pages of host memory behind the KV pool."),
    "host_pages_cached": ("num_host_pages_cached", "Those of them that hold a prefix."),
    "uptime_seconds": ("uptime_s", "Time since the engine started."),
}
_COUNTERS = {
    "prompt_tokens": ("num_prompt_tokens", "Prompt tokens of admitted requests."),
    "cached_tokens": ("num_cached_tokens", "Prompt tokens found in the prefix cache."),
    "host_cached_tokens": (
        "num_host_cached_tokens",
        "Tokens whose keys and values came back from host memory.",
    ),
    "generation_tokens": ("num_output_tokens", "Tokens generated."),
    "preemptions": ("num_preemptions", "Sequences that gave their pages back and were computed again."),
    "steps": ("num_steps", "Forwards of the engine."),
}


def prefix_hit_ratio(stats: EngineStats) -> float:
    """Share of prompt tokens that came from the prefix cache, 0 before the first prompt."""
    return stats.num_cached_tokens / stats.num_prompt_tokens if stats.num_prompt_tokens else 0.0


class _EngineCollector(Collector):
    """The last snapshot of the engine as metric families, kept while it is away; `lockstep_engine_up` tells."""

    def __init__(self) -> None:
        self.is_up = False
        self.stats: EngineStats | None = None

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        stats = self.stats
        yield GaugeMetricFamily("lockstep_engine_up", "1 while the engine answers.", value=float(self.is_up))
        if stats is None:
            return
        for name, (field, text) in _GAUGES.items():
            yield GaugeMetricFamily(f"lockstep_{name}", text, value=getattr(stats, field))
        for name, (field, text) in _COUNTERS.items():
            yield CounterMetricFamily(f"lockstep_{name}", text, value=getattr(stats, field))
        yield GaugeMetricFamily(
            "lockstep_prefix_hit_ratio", "Cached prompt tokens / prompt tokens.", value=prefix_hit_ratio(stats)
        )


class Metrics:
    """Counters and histograms of the HTTP side, and the engine's snapshot beside them. Times are in seconds."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._engine = _EngineCollector()
        self._registry.register(self._engine)
        self._requests = Counter(
            "lockstep_requests",
            "HTTP requests by route and outcome: ok, client_error, server_error, disconnected.",
            ("endpoint", "outcome"),
            registry=self._registry,
        )
        self.ttft_s = self._histogram(
            "time_to_first_token", "From arrival to the first token.", _TTFT_BUCKETS_S
        )
        self.inter_token_s = self._histogram(
            "inter_token", "Between outputs of a request, per token.", _INTER_TOKEN_BUCKETS_S
        )
        self.e2e_s = self._histogram(
            "e2e_request", "From arrival to the end of a finished request.", _E2E_BUCKETS_S
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"lockstep_{name}_seconds", text, buckets=buckets, registry=self._registry)

    def count_request(self, endpoint: str, outcome: str) -> None:
        """Adds one finished HTTP request."""
        self._requests.labels(endpoint, outcome).inc()

    def render(self, stats: EngineStats | None) -> bytes:
        """The text exposition format (version 0.0.4). `stats` None says that the engine is away."""
        self._engine.is_up = stats is not None
        self._engine.stats = stats or self._engine.stats
        return generate_latest(self._registry)
