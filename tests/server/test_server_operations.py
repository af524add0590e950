"""Health, key, figures, metrics, cache, documentation."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_client import FakeClient
from prometheus_client.parser import text_string_to_metric_families
from running_server import CHAT, HELLO, InProcess

from lockstep.core.errors import ConfigError
from lockstep.server.schema.base import Strict
from lockstep.server.schema.chat import ChatCompletionRequest, ChatMessage
from lockstep.server.schema.completions import CompletionRequest, EmbeddingRequest
from lockstep.server.schema.native import GenerateRequest, NativeSamplingParams

pytestmark = pytest.mark.suite("cpu")

App = Callable[..., InProcess]


def test_health(in_process: App) -> None:
    app = in_process()
    assert app.get("/health").status_code == 200
    assert app.get("/health_generate").status_code == 200
    [request] = app.client.requests
    assert request.params.max_tokens == 1
    app.client.is_alive = False
    for path in ("/health", "/health_generate", "/v1/loads", "/server_info"):
        assert app.get(path).status_code == 503, path


def test_health_generate_embeds_where_the_model_does(in_process: App) -> None:
    app = in_process(FakeClient(pooling="last"))
    assert app.get("/health_generate").status_code == 200
    assert app.client.requests[0].pooling == "last"


def test_busy_is_healthy_and_stuck_is_not(in_process: App, monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_process(FakeClient(is_full=True)).get("/health_generate").status_code == 200
    monkeypatch.setattr("lockstep.server.routes.operations.HEALTH_TIMEOUT_S", 0.1)
    app = in_process(FakeClient(delay_s=60))
    assert app.get("/health_generate").status_code == 503
    assert app.client.running == {}


def test_an_engine_that_does_not_answer_is_not_healthy(in_process: App) -> None:
    app = in_process()
    app.client.is_responsive = False
    response = app.get("/health")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead")


@pytest.mark.parametrize("key", ["", " "])
def test_an_empty_key_is_refused_at_start(in_process: App, key: str) -> None:
    with pytest.raises(ConfigError, match="--api-key"):
        in_process(api_key=key)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "Bearer wrong",
        "Bearer ",
        "Basic right",
        "right",
        "Bearer rightt",
        "Bearer é",
        "Bearer right\xa0",
        "Bearer \x85right",
    ],
)
def test_wrong_key(in_process: App, header: str | None) -> None:
    app = in_process(api_key="right")
    headers = [] if header is None else [(b"authorization", header.encode("latin-1"))]
    for method, path in [("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/no/such/path")]:
        response = app.send(method, path, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert "right" not in response.text


def test_right_key_and_open_paths(in_process: App) -> None:
    app = in_process(api_key="right")
    response = app.send("POST", CHAT, json={"messages": HELLO}, headers={"Authorization": "Bearer right"})
    assert response.status_code == 200
    assert app.get("/health").status_code == app.get("/").status_code == 200


def test_info_never_shows_the_key(in_process: App) -> None:
    app = in_process(api_key="right-key")
    response = app.send("GET", "/server_info", headers={"Authorization": "Bearer right-key"})
    assert "right-key" not in response.text
    body = response.json()
    assert body["options"]["api_key"] is True
    assert body["model"]["name"] == "tiny"
    assert body["stats"]["num_preemptions"] == 3


def test_model_info_and_loads(in_process: App) -> None:
    app = in_process()
    info = app.get("/model_info").json()
    assert (info["model_path"], info["is_generation"], info["context_length"]) == ("/models/tiny", True, 4096)
    [load] = app.get("/v1/loads").json()["loads"]
    assert (load["num_used_tokens"], load["max_total_num_tokens"], load["token_usage"]) == (400, 1600, 0.25)
    assert load["cache_hit_rate"] == 0.25


def test_flush_cache(in_process: App) -> None:
    assert in_process().post("/flush_cache", None).json() == {"success": True, "num_pages_freed": 7}


def samples_of(app: InProcess) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """The scrape as Prometheus' own parser reads it."""
    response = app.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(response.text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_metrics(in_process: App) -> None:
    app, other = in_process(), in_process()
    app.post(CHAT, {"messages": HELLO})
    app.post(CHAT, {"messages": HELLO, "stream": True})
    app.post(CHAT, {"messages": []})
    app.get("/no/such/path")
    found = samples_of(app)

    def requests(endpoint: str, outcome: str) -> float | None:
        return found.get(("lockstep_requests_total", (("endpoint", endpoint), ("outcome", outcome))))

    assert requests(CHAT, "ok") == 2
    assert requests(CHAT, "client_error") == 1
    assert requests("unmatched", "client_error") == 1
    plain = {name: value for (name, labels), value in found.items() if not labels}
    assert plain["lockstep_engine_up"] == 1
    assert plain["lockstep_kv_pages_total"] == 100
    assert plain["lockstep_kv_pages_used"] == 25
    assert plain["lockstep_prompt_tokens_total"] == 400
    assert plain["lockstep_cached_tokens_total"] == 100
    assert plain["lockstep_generation_tokens_total"] == 26
    assert plain["lockstep_preemptions_total"] == 3
    assert plain["lockstep_prefix_hit_ratio"] == 0.25
    assert plain["lockstep_time_to_first_token_seconds_count"] == 2
    assert plain["lockstep_inter_token_seconds_count"] == 2 * 12
    assert plain["lockstep_e2e_request_seconds_count"] == 2
    assert {"lockstep_running_requests", "lockstep_waiting_requests"} <= set(plain)
    assert ("lockstep_requests_total", (("endpoint", CHAT), ("outcome", "ok"))) not in samples_of(other)


def test_metrics_without_an_engine(in_process: App) -> None:
    found = samples_of(in_process(FakeClient(is_alive=False)))
    assert found["lockstep_engine_up", ()] == 0
    assert not any(name.startswith("lockstep_kv") for name, _ in found)


def test_metrics_keep_what_was_known_of_an_engine_that_is_away(in_process: App) -> None:
    app = in_process()
    before = samples_of(app)
    app.client.is_alive = False
    after = samples_of(app)
    assert after["lockstep_engine_up", ()] == 0
    assert after["lockstep_kv_pages_total", ()] == before["lockstep_kv_pages_total", ()] == 100


def test_unknown_tool_parser_is_known_at_start(in_process: App) -> None:
    with pytest.raises(ConfigError, match="hermes"):
        in_process(tool_call_parser="hermess")


DOCUMENT = (Path(__file__).parents[2] / "docs" / "http.md").read_text()


def test_document_lists_every_endpoint(in_process: App) -> None:
    paths = in_process().app.openapi()["paths"]
    documented = set(re.findall(r"^\| (GET|POST) \| `([^`]+)`", DOCUMENT, re.MULTILINE))
    actual = {
        (method.upper(), path.replace("{model_id}", "{id}"))
        for path, entry in paths.items()
        for method in entry
    }
    assert len(actual) > 15
    assert documented == actual


BODIES: list[type[Strict]] = [
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    EmbeddingRequest,
    GenerateRequest,
    NativeSamplingParams,
]


@pytest.mark.parametrize("body", BODIES)
def test_document_names_every_field(body: type[Strict]) -> None:
    missing = [name for name in body.wire_names() if f"`{name}`" not in DOCUMENT]
    assert missing == []


@pytest.mark.parametrize("body", BODIES)
def test_document_says_why_a_field_is_ignored(body: type[Strict]) -> None:
    lines = [f"| `{name}` | {reason} |" for name, reason in body.ignored.items()]
    assert [line for line in lines if line not in DOCUMENT] == []
