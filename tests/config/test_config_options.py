"""Declarations: the list is frozen, values are checked alike wherever they were written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.config import gather, wanted
from lockstep.config.components import ENGINE_OPTIONS, OPTIONS, SERVER_OPTIONS
from lockstep.config.environment import debugging, from_environment, variables
from lockstep.config.given import Given
from lockstep.config.option import AUTO
from lockstep.config.reference import reference_page
from lockstep.config.rules import RULES
from lockstep.core.errors import ConfigError

pytestmark = pytest.mark.suite("cpu")

DOCS = Path(__file__).parents[2] / "docs" / "configuration.md"

# Changing this list is a decision: scripts and clients depend on the names and on the defaults.
FROZEN = {
    "model": ("model", "MODEL", None),
    "tokenizer": ("model", "--tokenizer", None),
    "served_model_name": ("model", "--served-model-name", AUTO),
    "revision": ("model", "--revision", None),
    "chat_template": ("model", "--chat-template", None),
    "skip_tokenizer_init": ("model", "--skip-tokenizer-init", False),
    "load_format": ("model", "--load-format", AUTO),
    "dtype": ("model", "--dtype", AUTO),
    "quantization": ("model", "--quantization", AUTO),
    "context_length": ("model", "--context-length", AUTO),
    "seed": ("model", "--seed", 0),
    "tp": ("parallel", "--tp", 1),
    "dp": ("parallel", "--dp", 1),
    "ep": ("parallel", "--ep", 1),
    "enable_dp_attention": ("parallel", "--enable-dp-attention", False),
    "device": ("device", "--device", AUTO),
    "threads": ("device", "--threads", AUTO),
    "kv_cache_dtype": ("cache", "--kv-cache-dtype", AUTO),
    "page_size": ("cache", "--page-size", AUTO),
    "mem_fraction_static": ("cache", "--mem-fraction-static", AUTO),
    "max_total_tokens": ("cache", "--max-total-tokens", AUTO),
    "disable_radix_cache": ("cache", "--disable-radix-cache", False),
    "host_cache_size": ("cache", "--host-cache-size", 0.0),
    "max_running_requests": ("scheduler", "--max-running-requests", AUTO),
    "chunked_prefill_size": ("scheduler", "--chunked-prefill-size", AUTO),
    "max_queued_requests": ("scheduler", "--max-queued-requests", 1024),
    "schedule_policy": ("scheduler", "--schedule-policy", "fcfs"),
    "overlap": ("scheduler", "--overlap", AUTO),
    "attention_backend": ("kernels", "--attention-backend", AUTO),
    "force_kernel": ("kernels", "--force-kernel", ()),
    "strict_kernels": ("kernels", "--strict-kernels", False),
    "graphs": ("kernels", "--graphs", AUTO),
    "extend_graphs": ("kernels", "--extend-graphs", AUTO),
    "cache_dir": ("kernels", "--cache-dir", "~/.cache/lockstep"),
    "host": ("server", "--host", "127.0.0.1"),
    "port": ("server", "--port", 30000),
    "api_key": ("server", "--api-key", None),
    "max_body_bytes": ("server", "--max-body-bytes", 33554432),
    "tool_call_parser": ("server", "--tool-call-parser", None),
    "request_timeout_s": ("server", "--request-timeout-s", None),
    "log_level": ("server", "--log-level", "info"),
}


def test_option_list_is_frozen() -> None:
    found = {
        name: (option.component, "MODEL" if option.positional else option.flag, option.default)
        for name, option in OPTIONS.items()
    }
    assert found == FROZEN
    assert list(ENGINE_OPTIONS) + list(SERVER_OPTIONS) == list(OPTIONS)


def test_every_auto_has_a_rule_and_every_rule_an_auto() -> None:
    assert {name for name, option in OPTIONS.items() if option.has_auto} == set(RULES)


def test_reference_page_is_current() -> None:
    assert DOCS.read_text(encoding="utf-8") == reference_page(), (
        "run: python -m lockstep.config.reference > docs/configuration.md"
    )


def test_reference_page_names_every_option_and_variable() -> None:
    page = reference_page()
    for option in OPTIONS.values():
        assert ("`MODEL`" if option.positional else f"`{option.flag}") in page
        assert option.help.replace("|", "\\|") in page
    for variable in variables():
        assert f"`{variable}`" in page


def test_help_texts_are_sentences() -> None:
    for option in OPTIONS.values():
        assert option.help.endswith("."), option.name
        assert len(option.help) < 120, option.name


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("tp", 0, "tp takes an integer from 1 up, not 0"),
        ("tp", True, "tp takes an integer from 1 up, not True"),
        ("tp", 1.0, "tp takes an integer from 1 up, not 1.0"),
        ("port", 65536, "port takes an integer from 0 to 65535, not 65536"),
        (
            "dtype",
            "bfloat",
            "dtype takes one of auto, float32, bfloat16, float16, not 'bfloat'; did you mean 'bfloat16'?",
        ),
        ("dtype", 16, "dtype takes one of auto, float32, bfloat16, float16, not 16"),
        ("schedule_policy", AUTO, "schedule_policy takes one of fcfs, priority, not 'auto'"),
        ("mem_fraction_static", 1.0, "mem_fraction_static takes a number above 0 and below 1 or auto, not 1.0"),
        (
            "mem_fraction_static",
            float("nan"),
            "mem_fraction_static takes a number above 0 and below 1 or auto, not nan",
        ),
        ("request_timeout_s", 0.0, "request_timeout_s takes a number above 0, not 0.0"),
        ("force_kernel", "rope=torch", "force_kernel takes a list of texts, not 'rope=torch'"),
        ("force_kernel", [3], "force_kernel takes a text, not 3"),
        ("disable_radix_cache", 1, "disable_radix_cache takes true or false, not 1"),
        ("context_length", "4096", "context_length takes an integer from 1 up or auto, not '4096'"),
    ],
)
def test_refused_python_values(name: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        gather({name: value}, environ={})
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("name", "nearest"), [("tensor_parallel", None), ("kv_cache_dytpe", "kv_cache_dtype"), ("modle", "model")]
)
def test_unknown_names_are_errors(name: str, nearest: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        gather({name: 1}, environ={})
    hint = f"; did you mean {nearest!r}?" if nearest else ""
    assert str(caught.value) == f"unknown option {name!r}{hint}"


def test_options_outside_the_allowed_are_unknown() -> None:
    with pytest.raises(ConfigError, match="unknown option 'port'"):
        gather({"port": 1}, environ={}, allowed=ENGINE_OPTIONS)
    assert gather({"tp": 2}, environ={"LOCKSTEP_PORT": "80"}, allowed=ENGINE_OPTIONS)["tp"].value == 2


_NUMERIC = sorted(name for name, option in OPTIONS.items() if option.kind is int)


@settings(deadline=None, print_blob=True)
@given(st.sampled_from(_NUMERIC), st.integers(-(2**70), 2**70))
def test_text_and_python_are_checked_alike(name: str, value: int) -> None:
    option = OPTIONS[name]
    inside = (option.low is None or value >= option.low) and (option.high is None or value <= option.high)
    if inside:
        assert option.parse(str(value), name) == option.check(value, name) == value
        return
    for attempt in (lambda: option.parse(str(value), name), lambda: option.check(value, name)):
        with pytest.raises(ConfigError, match=name):
            attempt()


@pytest.mark.parametrize(("text", "value"), [("1", True), ("Yes", True), ("off", False), ("FALSE", False)])
def test_booleans_as_text(text: str, value: bool) -> None:
    assert OPTIONS["strict_kernels"].parse(text, "X") is value


@pytest.mark.parametrize("text", ["", "2", "maybe"])
def test_other_texts_are_no_booleans(text: str) -> None:
    with pytest.raises(ConfigError, match="X takes true or false"):
        OPTIONS["strict_kernels"].parse(text, "X")


def test_none_and_auto_mean_not_given() -> None:
    assert gather({"dtype": None, "page_size": AUTO, "tokenizer": None}, environ={}) == {}


def test_explicit_values_win_over_the_environment() -> None:
    environ = {"LOCKSTEP_DEVICE": "cuda", "LOCKSTEP_PORT": "8000", "LOCKSTEP_THREADS": "3", "LOCKSTEP_HOST": ""}
    found = gather({"device": Given("null", "command line"), "port": 9000, "threads": AUTO}, environ=environ)
    assert found == {"device": Given("null", "command line"), "port": Given(9000, "python")}
    assert wanted(found, "device") == "null"
    assert wanted(found, "model") is None
    assert gather({}, environ=environ)["threads"] == Given(3, "environment")


def test_environment_errors_name_the_variable() -> None:
    with pytest.raises(ConfigError, match="LOCKSTEP_PORT takes an integer from 0 to 65535, not 'http'"):
        from_environment({"LOCKSTEP_PORT": "http"})


def test_environment_table_is_small_and_ours() -> None:
    assert len(variables()) <= 15
    assert all(name.startswith("LOCKSTEP_") for name in variables())


def test_environment_is_read_when_asked_and_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_MODEL", "somewhere/model.gguf")
    before = dict(os.environ)
    assert wanted(gather({}), "model") == "somewhere/model.gguf"
    monkeypatch.setenv("LOCKSTEP_MODEL", "elsewhere")
    assert wanted(gather({}), "model") == "elsewhere"
    assert {**before, "LOCKSTEP_MODEL": "elsewhere"} == dict(os.environ)


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("yes", True), ("0", False), ("", False)])
def test_debug_switch(value: str, expected: bool) -> None:
    assert debugging({"LOCKSTEP_DEBUG": value}) is expected
    assert debugging({}) is False
