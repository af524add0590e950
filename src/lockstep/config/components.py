"""Every option of Lockstep, declared once: name, resolved type, default, limits, help.

The command line, its help, the checks on Python keywords and `docs/configuration.md` are generated from here.
A field whose default is AUTO is decided by the rule of the same name in `rules.py`.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from pathlib import Path

from lockstep.config.option import AUTO, Option, option, options_of

DTYPES = ("float32", "bfloat16", "float16")
MAX_PORT = 65_535


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which model, and how its numbers are held."""

    model: str | None = option(
        None,
        positional=True,
        metavar="MODEL",
        env="LOCKSTEP_MODEL",
        help="Directory in Hugging Face layout, .gguf file or Hub id. Omitted: the embedded small model.",
    )
    tokenizer: str | None = option(
        None, metavar="PATH", help="Directory or file to take the tokenizer from, when not from the model."
    )
    served_model_name: str = option(
        AUTO, metavar="NAME", help="Name of the model for clients, in /v1/models and in requests."
    )
    revision: str | None = option(
        None, metavar="REV", help="Branch, tag or commit of a Hub id. Omitted: its main branch."
    )
    chat_template: str | None = option(
        None, metavar="FILE", help="Jinja file that replaces the model's own chat template."
    )
    skip_tokenizer_init: bool = option(
        False, help="Open no tokenizer: prompts are token ids, and answers have no text."
    )
    load_format: str = option(
        AUTO,
        choices=("files", "dummy"),
        help="dummy: weights that nobody trained, made on the device from config.json alone, to measure speed.",
    )
    dtype: str = option(AUTO, choices=DTYPES, help="Type of weights and activations.")
    quantization: str = option(
        AUTO,
        choices=("none", "stored", "q4_0", "q8_0", "int8", "bf16"),
        help="How matrices are held: none is as --dtype, stored as in the file, else rounded so while loading.",
    )
    context_length: int = option(AUTO, low=1, help="Most tokens of one request, prompt and answer together.")
    seed: int = option(
        0, low=0, high=2**64 - 1, help="Seed from which requests without one of their own draw theirs."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelOptions:
    """How many ranks share the work, and along which axes."""

    tp: int = option(1, low=1, help="Tensor parallel size: ranks that share every layer.")
    dp: int = option(1, low=1, help="Data parallel size: engine replicas that share the requests.")
    ep: int = option(1, low=1, help="Expert parallel size, for mixture-of-experts models.")
    enable_dp_attention: bool = option(
        False, help="Attention in data parallel inside a replica, for mixture-of-experts models."
    )

    @property
    def mesh_sizes(self) -> dict[str, int]:
        """The axes that the ranks of one replica lie on, and their sizes; neighbours on the last one are neighbours."""
        return {"ep": self.ep, "tp": self.tp}

    @property
    def num_ranks(self) -> int:
        """Ranks of one replica."""
        return self.ep * self.tp


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOptions:
    """Where the work runs."""

    device: str = option(
        AUTO, metavar="NAME", env="LOCKSTEP_DEVICE", help="Platform to run on, such as cpu or cuda."
    )
    threads: int = option(AUTO, low=1, env="LOCKSTEP_THREADS", help="CPU threads of each rank.")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """The paged KV pool and the prefix cache.

    `max_total_tokens` is None where only the executor can measure what fits.
    """

    kv_cache_dtype: str = option(AUTO, choices=DTYPES, help="Type of cached keys and values.")
    page_size: int = option(AUTO, low=1, high=1024, help="Tokens of one page, the unit of KV allocation.")
    mem_fraction_static: float = option(
        AUTO,
        low=0,
        high=1,
        exclusive=True,
        help="Share of the device's free memory that weights and the KV pool may take.",
    )
    max_total_tokens: int | None = option(AUTO, low=1, help="Tokens that the KV pool holds.")
    disable_radix_cache: bool = option(False, help="Do not reuse the KV of prefixes that requests share.")
    host_cache_size: float = option(
        0.0,
        low=0,
        metavar="GIB",
        help="Host memory of each rank, in GiB, for cached prefixes that make room on the device; 0 drops them.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOptions:
    """Who runs when, and how much at once."""

    max_running_requests: int = option(AUTO, low=1, help="Sequences that may share one step.")
    chunked_prefill_size: int = option(AUTO, low=1, help="Most tokens of one step; longer prompts are cut.")
    max_queued_requests: int = option(
        1024, low=1, help="Requests that may wait; more are refused, to be tried again later."
    )
    schedule_policy: str = option(
        "fcfs",
        choices=("fcfs", "priority"),
        help="fcfs: in order of arrival. priority: lower numbers first, then arrival.",
    )
    overlap: str = option(
        AUTO,
        choices=("on", "off"),
        help="on: the next step is planned while the device computes. off: each step waits for the last one's result.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelOptions:
    """Which implementation serves each operator."""

    # None: the first of the platform's preferences that can serve the model.
    attention_backend: str | None = option(AUTO, metavar="NAME", help="Attention backend, by name.")
    force_kernel: tuple[str, ...] = option(
        (), metavar="OP=KERNEL", help="Serve operator OP with KERNEL or fail. May be repeated."
    )
    strict_kernels: bool = option(
        False, help="Fail where the platform's first choice of kernel cannot serve an operator."
    )
    graphs: str = option(
        AUTO,
        choices=("off", "piecewise", "full"),
        help="Steps of single tokens as device graphs: whole (full), or cut at attention (piecewise). off: eager.",
    )
    extend_graphs: str = option(
        AUTO,
        choices=("off", "piecewise"),
        help="Steps with pieces of prompts as device graphs cut at attention (piecewise). off: eager.",
    )

    cache_dir: str = option(
        "~/.cache/lockstep",
        metavar="DIR",
        env="LOCKSTEP_CACHE_DIR",
        help="Folder of what was measured and compiled on this machine: `bench tune-moe` and kernels write there.",
    )

    @property
    def measured_in(self) -> Path:
        """`cache_dir`, with the user's folder in the place of ~."""
        return Path(self.cache_dir).expanduser()

    @property
    def forced(self) -> dict[str, str]:
        """Operator -> kernel, from `force_kernel`."""
        return dict(pair.split("=", 1) for pair in self.force_kernel)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """The HTTP server. Nothing here depends on the model or the device."""

    host: str = option("127.0.0.1", metavar="ADDR", env="LOCKSTEP_HOST", help="Address to listen on.")
    port: int = option(
        30_000, low=0, high=MAX_PORT, env="LOCKSTEP_PORT", help="Port to listen on; 0 takes a free one."
    )
    api_key: str | None = option(
        None,
        metavar="KEY",
        env="LOCKSTEP_API_KEY",
        secret=True,
        help="Key that clients must send. The variable LOCKSTEP_API_KEY keeps it out of the process list.",
    )
    max_body_bytes: int = option(32 * 2**20, low=1024, metavar="BYTES", help="Largest request body.")
    tool_call_parser: str | None = option(
        None, metavar="NAME", help="How tool calls are written. Omitted: recognised in the chat template."
    )
    request_timeout_s: float | None = option(
        None,
        low=0,
        exclusive=True,
        metavar="SECONDS",
        help="Time after which a request ends with what it has. Omitted: none.",
    )
    log_level: str = option(
        "info",
        choices=("debug", "info", "warning", "error"),
        env="LOCKSTEP_LOG_LEVEL",
        help="Least severe message to print.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """All components with every value concrete. Made by `resolve`; the fields' order is the order of help."""

    model: ModelOptions
    parallel: ParallelOptions
    device: DeviceOptions
    cache: CacheOptions
    scheduler: SchedulerOptions
    kernels: KernelOptions
    server: ServerOptions


COMPONENTS: dict[str, type] = typing.get_type_hints(EngineConfig)
"""Component name -> its declaration, in order."""

OPTIONS: dict[str, Option] = {
    found.name: found for component, kind in COMPONENTS.items() for found in options_of(component, kind)
}
"""Every option by name; a name is unique across components."""

ENGINE_OPTIONS: dict[str, Option] = {n: o for n, o in OPTIONS.items() if o.component != "server"}
SERVER_OPTIONS: dict[str, Option] = {n: o for n, o in OPTIONS.items() if o.component == "server"}
