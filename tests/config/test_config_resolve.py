"""The resolver: what "auto" becomes, who is named for it, and which contradictions are refused."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.config import Given, ModelFacts, Resolution, gather, resolve, resolve_server
from lockstep.config.components import COMPONENTS, OPTIONS
from lockstep.config.memory import SMALLEST_POOL_TOKENS, MemoryPlan, human_bytes
from lockstep.config.option import AUTO
from lockstep.core.capabilities import Capabilities
from lockstep.core.errors import ConfigError, OutOfMemory
from lockstep.layers.attention import head_parts

pytestmark = pytest.mark.suite("cpu")

GIB = 2**30

SMALL = ModelFacts(
    name="small",
    architecture="LlamaForCausalLM",
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    hidden_size=576,
    vocab_size=49_152,
    context_length=8192,
    num_parameters=134_515_008,
    weight_bytes=94_000_000,
    stored_dtype="q4_1",
)
LARGE = dataclasses.replace(
    SMALL,
    name="large",
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    context_length=131_072,
    num_parameters=8_000_000_000,
    stored_dtype="bfloat16",
)
HOST = Capabilities(
    platform="cpu",
    device_type="cpu",
    device_name="a processor",
    memory_bytes=16 * GIB,
    fast_dtypes=("float32",),
    collective_backend="gloo",
    num_threads=8,
)
FAST_HOST = dataclasses.replace(HOST, fast_dtypes=("bfloat16", "float32"))
GPU = Capabilities(
    platform="cuda",
    device_type="cuda",
    device_name="a card",
    num_devices=4,
    memory_bytes=80 * GIB,
    fast_dtypes=("bfloat16", "float16"),
    has_streams=True,
    has_graphs=True,
    collective_backend="nccl",
)


def resolved(
    model: ModelFacts = SMALL, on: Capabilities = HOST, available_bytes: int | None = None, **options: Any
) -> Resolution:
    return resolve(gather(options, environ={}), model, on, available_bytes=available_bytes)


def values(resolution: Resolution) -> dict[str, Any]:
    return {
        name: getattr(getattr(resolution.config, option.component), name) for name, option in OPTIONS.items()
    }


def test_defaults_on_a_small_host() -> None:
    found = values(resolved())
    expected = {
        "model": None,
        "served_model_name": "small",
        "dtype": "float32",
        "quantization": "none",
        "context_length": 8192,
        "device": "cpu",
        "threads": 8,
        "kv_cache_dtype": "float32",
        "page_size": 32,
        "mem_fraction_static": 0.8,
        "max_total_tokens": 65_536,
        "max_running_requests": 64,
        "chunked_prefill_size": 512,
        "overlap": "off",
        "attention_backend": None,
        "graphs": "off",
        "extend_graphs": "off",
    }
    assert {name: found[name] for name in expected} == expected


def test_defaults_on_an_accelerator() -> None:
    found = values(resolved(LARGE, GPU))
    expected = {
        "dtype": "bfloat16",
        "kv_cache_dtype": "bfloat16",
        "context_length": 131_072,
        "max_total_tokens": None,
        "max_running_requests": 256,
        "chunked_prefill_size": 8192,
        "overlap": "on",
        "graphs": "full",
        "extend_graphs": "piecewise",
        "mem_fraction_static": 0.88,
        "device": "cuda",
    }
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("model", [SMALL, LARGE])
@pytest.mark.parametrize("device", [HOST, FAST_HOST, GPU])
def test_nothing_is_left_to_decide(model: ModelFacts, device: Capabilities) -> None:
    resolution = resolved(model, device, available_bytes=80 * GIB)
    assert AUTO not in values(resolution).values()
    assert [decision.name for decision in resolution.decisions] == list(OPTIONS)
    for decision in resolution.decisions:
        assert decision.value == values(resolution)[decision.name]
        assert decision.why or decision.source == "default"


@pytest.mark.parametrize(
    ("stored", "fast", "dtype", "source"),
    [
        ("bfloat16", ("bfloat16", "float32"), "bfloat16", "model"),
        ("float32", ("bfloat16", "float32"), "float32", "model"),
        ("bfloat16", ("float32",), "float32", "device"),
        ("q4_k", ("bfloat16", "float32"), "bfloat16", "device"),
        ("float16", ("bfloat16", "float16"), "float16", "model"),
    ],
)
def test_dtype(stored: str, fast: tuple[str, ...], dtype: str, source: str) -> None:
    resolution = resolved(
        dataclasses.replace(SMALL, stored_dtype=stored), dataclasses.replace(HOST, fast_dtypes=fast)
    )
    assert resolution.config.model.dtype == dtype
    assert next(d.source for d in resolution.decisions if d.name == "dtype") == source


def test_kv_cache_dtype_follows_the_model_only_where_that_is_fast() -> None:
    assert resolved(on=FAST_HOST).config.model.dtype == "bfloat16"
    assert resolved(on=FAST_HOST).config.cache.kv_cache_dtype == "float32"
    able = dataclasses.replace(FAST_HOST, features=frozenset({"native"}))
    assert resolved(on=able).config.cache.kv_cache_dtype == "bfloat16"
    assert resolved(on=able, dtype="float32").config.cache.kv_cache_dtype == "float32"
    assert resolved(on=FAST_HOST, kv_cache_dtype="bfloat16").config.cache.kv_cache_dtype == "bfloat16"


def test_integers_of_a_file_are_kept_where_kernels_read_them() -> None:
    able = dataclasses.replace(FAST_HOST, features=frozenset({"native"}))
    packed = dataclasses.replace(SMALL, stored_dtype="q4_1")
    assert resolved(packed, able).config.model.quantization == "stored"
    assert resolved(packed, able).config.cache.page_size == 16
    plain = dataclasses.replace(SMALL, stored_dtype="bfloat16")
    assert resolved(plain, able).config.model.quantization == "none"
    assert resolved(packed, FAST_HOST).config.model.quantization == "none"
    assert resolved(packed, able, dtype="float32").config.model.quantization == "none"


def test_context_is_bounded_on_a_host_unless_asked_for() -> None:
    assert resolved(LARGE, HOST, 64 * GIB).config.model.context_length == 32_768
    asked = resolved(LARGE, HOST, 128 * GIB, context_length=131_072)
    assert asked.config.model.context_length == 131_072
    assert asked.config.cache.max_total_tokens == 131_072


def test_ranks_share_the_threads() -> None:
    assert resolved(LARGE, HOST, 90 * GIB, tp=4).config.device.threads == 2
    assert resolved(tp=3, dp=4).config.device.threads == 1


def test_a_pool_that_was_asked_for_is_whole_pages_and_says_so() -> None:
    found = resolved(max_total_tokens=20, page_size=16)
    (decision,) = (each for each in found.decisions if each.name == "max_total_tokens")
    assert found.config.cache.max_total_tokens == decision.value == 16
    assert "20, down to whole pages of 16" in decision.why
    exact = resolved(max_total_tokens=48, page_size=16)
    assert exact.config.cache.max_total_tokens == 48
    assert all("whole pages" not in each.why for each in exact.decisions if each.name == "max_total_tokens")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"context_length": 8193}, "--context-length 8193 is more than small was trained for (8192); lower it"),
        ({"ep": 2}, "--ep 2: only mixture-of-experts models use it"),
        ({"enable_dp_attention": True}, "--enable-dp-attention: only mixture-of-experts models use it"),
        ({"tp": 4}, "--tp 4 cannot share out 9 query heads and 3 KV heads; small takes --tp 1, 2, 3 or 9"),
        ({"max_total_tokens": 31}, "--max-total-tokens 31 is less than one page (--page-size 32)"),
        ({"device": "cuda"}, "--device cuda was asked for, but cpu was opened"),
        ({"force_kernel": ["rope"]}, "--force-kernel takes OP=KERNEL"),
    ],
)
def test_contradictions(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(**options)
    assert str(caught.value).startswith(text)


def test_ranks_need_devices_only_where_each_takes_one() -> None:
    assert resolved(LARGE, GPU, tp=4).config.parallel.tp == 4
    with pytest.raises(ConfigError, match=r"--tp 4 with --dp 2 needs 8 devices, but cuda has 4"):
        resolved(LARGE, GPU, tp=4, dp=2)
    assert resolved(tp=9).config.parallel.tp == 9


def test_forced_kernels_as_a_mapping() -> None:
    config = resolved(force_kernel=["rope=reference", "linear=torch"]).config
    assert config.kernels.forced == {"rope": "reference", "linear": "torch"}


def test_a_tight_host_gets_a_smaller_pool_that_really_fits() -> None:
    available = 2 * GIB
    config = resolved(available_bytes=available).config
    tokens = config.cache.max_total_tokens
    assert tokens is not None and tokens % 32 == 0
    weights, pool = 134_515_008 * 4, tokens * 2 * 30 * 3 * 64 * 4
    assert weights + pool <= 0.8 * available < weights + pool + 32 * 2 * 30 * 3 * 64 * 4


@pytest.mark.parametrize("device", [HOST, GPU])
def test_no_room_for_the_pool(device: Capabilities) -> None:
    with pytest.raises(OutOfMemory) as caught:
        resolved(LARGE, device, available_bytes=8 * GIB)
    text = str(caught.value)
    assert re.search(r"need [\d.]+ GiB, [\d.]+ GiB more than the [\d.]+ GiB that may be used", text)
    assert "\n" not in text


@pytest.mark.parametrize("device", [HOST, dataclasses.replace(GPU, num_devices=8)])
@pytest.mark.parametrize("gibibytes", [9, 12, 15, 16, 17, 24, 29, 31])
def test_what_is_proposed_fits(device: Capabilities, gibibytes: int) -> None:
    wanted = {"max_total_tokens": 20_000}
    try:
        resolved(LARGE, device, available_bytes=gibibytes * GIB, **wanted)
        return
    except OutOfMemory as error:
        text = str(error)
    proposed = re.findall(r"--([a-z-]+) ([\w.]+)", text.partition("what would fit: ")[2])
    for flag, value in proposed:
        if flag == "context-length":
            continue
        name = flag.replace("-", "_")
        kind = (
            type(value)
            if name in ("dtype", "kv_cache_dtype", "quantization")
            else float
            if "." in value
            else int
        )
        found = resolved(LARGE, device, available_bytes=gibibytes * GIB, **{**wanted, name: kind(value)})
        assert getattr(found.config.cache, "max_total_tokens", None)
    assert proposed or "choose a smaller model" in text


def test_an_asked_for_pool_must_fit() -> None:
    assert resolved(max_total_tokens=32).config.cache.max_total_tokens == 32
    with pytest.raises(OutOfMemory, match="a KV pool of 10000000 tokens"):
        resolved(max_total_tokens=10_000_000)


def test_unknown_memory_is_no_reason_to_refuse() -> None:
    silent = dataclasses.replace(HOST, memory_bytes=0)
    assert resolved(LARGE, silent).config.cache.max_total_tokens == 65_536


def test_replicas_on_a_host_share_its_memory() -> None:
    alone = resolved(available_bytes=3 * GIB).config.cache.max_total_tokens
    paired = resolved(available_bytes=6 * GIB, dp=2).config.cache.max_total_tokens
    assert alone == paired


def test_provenance_and_secrets() -> None:
    options = gather(
        {"api_key": Given("s3cret", "command line"), "tp": 3}, environ={"LOCKSTEP_LOG_LEVEL": "debug"}
    )
    resolution = resolve(options, SMALL, HOST)
    by_name = {decision.name: decision for decision in resolution.decisions}
    assert (by_name["tp"].source, by_name["tp"].why) == ("python", "")
    assert (by_name["log_level"].source, by_name["log_level"].why) == ("environment", "from LOCKSTEP_LOG_LEVEL")
    assert by_name["api_key"].value == "(hidden)"
    assert resolution.config.server.api_key == "s3cret"
    assert "s3cret" not in repr(resolution)


def test_everything_is_frozen() -> None:
    config = resolved().config
    for component in COMPONENTS:
        part = getattr(config, component)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, None)


def test_server_options_need_no_facts() -> None:
    given_options = gather({"port": 0, "tp": 3}, environ={"LOCKSTEP_API_KEY": "k"})
    server = resolve_server(given_options)
    assert server == resolve(given_options, SMALL, HOST).config.server
    assert (server.port, server.api_key) == (0, "k")


@settings(deadline=None, print_blob=True, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 12))
def test_valid_tp_is_what_the_attention_layer_can_deal(groups: int, num_kv_heads: int) -> None:
    """Against the layer's own dealing: every query head once, on a rank that holds its KV head."""
    model = dataclasses.replace(SMALL, num_heads=groups * num_kv_heads, num_kv_heads=num_kv_heads)
    for tp in range(1, model.num_heads + 2):
        dealt = []
        try:
            for rank in range(tp):
                q, k, v = head_parts("x", model.num_heads, num_kv_heads, 1, rank, tp)
                heads = range(q.start, q.start + q.length)
                assert (k.start, k.length) == (v.start, v.length)
                assert {head // groups for head in heads} == set(range(k.start, k.start + k.length))
                dealt.extend(heads)
        except ConfigError:
            assert tp not in model.valid_tp(), (tp, model.num_heads, num_kv_heads)
        else:
            assert dealt == list(range(model.num_heads))
            assert tp in model.valid_tp(), (tp, model.num_heads, num_kv_heads)


@pytest.mark.parametrize(("dtype", "numpy_dtype"), [("float32", np.float32), ("float16", np.float16)])
@pytest.mark.parametrize("tp", [1, 3, 9])
def test_kv_bytes_are_those_of_a_pool(dtype: str, numpy_dtype: type, tp: int) -> None:
    heads = {1: 3, 3: 1, 9: 1}[tp]
    pool = np.zeros((SMALL.num_layers, 2, 1, heads, SMALL.head_dim), dtype=numpy_dtype)
    assert SMALL.kv_bytes_per_token(dtype, tp) == pool.nbytes


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**30, "1.0 GiB"), (2**51, "2048.0 TiB")],
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_smallest_pool_is_more_than_a_page() -> None:
    assert SMALLEST_POOL_TOKENS >= 16


def test_config_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import lockstep.config, lockstep.config.reference; "
        "lockstep.config.reference.reference_page()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


MIXTURE = dataclasses.replace(
    LARGE, num_parameters=8_000_000_000, num_experts=8, num_expert_parameters=6_000_000_000
)


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_expert_ranks_copy_everything_but_experts(tp: int, ep: int) -> None:
    """bfloat16: 12 GB of experts once, 4 GB of the rest for each set of tensor-parallel ranks."""
    resolution = resolved(MIXTURE, FAST_HOST, available_bytes=200 * GIB, tp=tp, ep=ep)
    assert resolution.config.device.threads == 8 // (tp * ep)
    on_host, on_card = (
        MemoryPlan.of(MIXTURE, values(resolution), available_bytes=200 * GIB, ranks_share_memory=is_host)
        for is_host in (True, False)
    )
    assert on_host.weight_bytes == 12_000_000_000 + ep * 4_000_000_000
    assert on_card.weight_bytes == 12_000_000_000 // (tp * ep) + 4_000_000_000 // tp
    assert on_host.token_bytes == tp * ep * on_card.token_bytes


def test_devices_for_every_rank() -> None:
    with pytest.raises(ConfigError, match=r"--tp 2 with --ep 4 needs 8 devices, but cuda has 4; lower them"):
        resolved(MIXTURE, GPU, tp=2, ep=4)


@pytest.mark.parametrize("axis", ["tp", "ep"])
def test_ranks_need_collectives(axis: str) -> None:
    alone = dataclasses.replace(HOST, collective_backend=None)
    experts = dataclasses.replace(SMALL, num_experts=8)
    assert resolved(experts, alone).config.parallel.num_ranks == 1
    with pytest.raises(ConfigError, match=f"--{axis} 2: cpu states no collectives for ranks to sum over"):
        resolved(experts, alone, **{axis: 2})


def test_one_operator_is_forced_to_one_kernel() -> None:
    same = ("rms_norm=torch", "rms_norm=torch", "rope=torch")
    assert resolved(force_kernel=same).config.kernels.forced == {"rms_norm": "torch", "rope": "torch"}
    with pytest.raises(ConfigError, match="asks for rms_norm=torch and for rms_norm=native; give one of them"):
        resolved(force_kernel=("rms_norm=torch", "rms_norm=native"))


def test_a_model_that_float16_cannot_hold() -> None:
    gemma = dataclasses.replace(SMALL, architecture="Gemma3ForCausalLM", stored_dtype="float16")
    old_card = dataclasses.replace(GPU, fast_dtypes=("float16",))
    for device, expected in ((GPU, "bfloat16"), (old_card, "float32"), (FAST_HOST, "bfloat16")):
        found = resolved(gemma, device, available_bytes=64 * GIB)
        assert found.config.model.dtype == expected
        with pytest.raises(ConfigError, match="--dtype float16: sums of small are too large for it"):
            resolved(gemma, device, available_bytes=64 * GIB, dtype="float16")
    assert resolved(dataclasses.replace(SMALL, stored_dtype="float16"), GPU).config.model.dtype == "float16"


def test_weights_as_they_are_held() -> None:
    """Experts are values of the dtype, whatever the others are; blocks may take more room than in the file."""
    model = dataclasses.replace(
        SMALL, num_parameters=1000, weight_bytes=600, widened_bytes=60, num_experts=8, num_expert_parameters=750
    )
    assert model.held_weight_bytes("bfloat16") == 2000
    assert model.held_weight_bytes("bfloat16", "q8_0") == 1500 + 265
    assert model.held_weight_bytes("bfloat16", "stored") == 1500 + 165
    assert model.held_weight_bytes("float32", "stored", copies=2) == 3000 + 2 * 165
