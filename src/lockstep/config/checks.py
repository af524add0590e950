"""What must hold between decided values and facts. Each check is pure; it raises ConfigError or OutOfMemory."""

from __future__ import annotations

from lockstep.config.memory import SMALLEST_POOL_TOKENS, remedies
from lockstep.config.rules import Situation
from lockstep.core.errors import ConfigError, OutOfMemory


def _ep_shares_out_experts(at: Situation) -> None:
    ep, num_experts = at.decided["ep"], at.model.num_experts
    if ep > 1 and not num_experts:
        raise ConfigError(
            f"--ep {ep}: only mixture-of-experts models use it, and {at.model.name} has no experts; use --tp"
        )
    if ep > max(1, num_experts):
        raise ConfigError(f"--ep {ep} cannot share out the {num_experts} experts of {at.model.name}; lower it")


def _attention_is_tensor_parallel(at: Situation) -> None:
    if at.decided["enable_dp_attention"]:
        raise ConfigError(
            "--enable-dp-attention: only mixture-of-experts models use it, and it is not supported yet; "
            "share attention out with --tp"
        )


def _tp_cuts_heads(at: Situation) -> None:
    tp, valid = at.decided["tp"], at.model.valid_tp()
    if tp not in valid:
        raise ConfigError(
            f"--tp {tp} cannot share out {at.model.num_heads} query heads and {at.model.num_kv_heads} KV "
            f"heads; {at.model.name} takes --tp {_either(valid)}"
        )


def _dtype_holds_the_sums(at: Situation) -> None:
    if at.decided["dtype"] == "float16" and at.model.overflows_float16:
        raise ConfigError(
            f"--dtype float16: sums of {at.model.name} are too large for it; take bfloat16 or float32"
        )


def _enough_devices(at: Situation) -> None:
    present = at.device.num_devices
    if at.on_accelerator and at.num_ranks > present:
        raise ConfigError(
            f"{_ranks(at)} needs {at.num_ranks} devices, but {at.device.platform} has {present}; lower them"
        )


def _ranks_have_collectives(at: Situation) -> None:
    if at.decided["tp"] * at.decided["ep"] > 1 and at.device.collective_backend is None:
        raise ConfigError(
            f"{_ranks(at)}: {at.device.platform} states no collectives for ranks to sum over; leave it out"
        )


def _device_as_asked(at: Situation) -> None:
    if at.decided["device"] != at.device.platform:
        raise ConfigError(f"--device {at.decided['device']} was asked for, but {at.device.platform} was opened")


def _context_within_model(at: Situation) -> None:
    asked, trained = at.decided["context_length"], at.model.context_length
    if asked > trained:
        raise ConfigError(
            f"--context-length {asked} is more than {at.model.name} was trained for ({trained}); lower it"
        )


def _pool_holds_a_page(at: Situation) -> None:
    tokens, page_size = at.decided["max_total_tokens"], at.decided["page_size"]
    if tokens is not None and tokens < page_size:
        raise ConfigError(f"--max-total-tokens {tokens} is less than one page (--page-size {page_size})")


def _pool_fits(at: Situation) -> None:
    plan, num_tokens = at.memory_plan(), at.decided["max_total_tokens"] or SMALLEST_POOL_TOKENS
    if plan.lacks(num_tokens):
        raise OutOfMemory(f"{plan.shortage(num_tokens)}; {_either_remedy(at, num_tokens)}")


def _host_cache_has_prefixes(at: Situation) -> None:
    if at.decided["host_cache_size"] and at.decided["disable_radix_cache"]:
        raise ConfigError(
            f"--host-cache-size {at.decided['host_cache_size']:g} keeps cached prefixes, of which "
            "--disable-radix-cache leaves none; drop one of them"
        )


def _either_remedy(at: Situation, num_tokens: int) -> str:
    found = remedies(
        at.model,
        at.decided,
        num_tokens,
        available_bytes=at.available_bytes,
        ranks_share_memory=not at.on_accelerator,
        num_devices=at.device.num_devices,
    )
    return f"what would fit: {', or '.join(found)}" if found else "choose a smaller model or a larger device"


def _forced_kernels_are_pairs(at: Situation) -> None:
    forced: dict[str, str] = {}
    for pair in at.decided["force_kernel"]:
        op, equals, kernel = pair.partition("=")
        if not (op and equals and kernel):
            raise ConfigError(f"--force-kernel takes OP=KERNEL, such as rms_norm=reference, not {pair!r}")
        if forced.setdefault(op, kernel) != kernel:
            raise ConfigError(f"--force-kernel asks for {op}={forced[op]} and for {pair}; give one of them")


def _graphs_are_there(at: Situation) -> None:
    for name in ("graphs", "extend_graphs"):
        if at.decided[name] != "off" and not at.device.has_graphs:
            option = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{option} {at.decided[name]}: {at.device.platform} has no device graphs; use {option} off"
            )


CHECKS = (
    _device_as_asked,
    _ep_shares_out_experts,
    _attention_is_tensor_parallel,
    _tp_cuts_heads,
    _dtype_holds_the_sums,
    _enough_devices,
    _ranks_have_collectives,
    _context_within_model,
    _pool_holds_a_page,
    _pool_fits,
    _host_cache_has_prefixes,
    _forced_kernels_are_pairs,
    _graphs_are_there,
)


def _ranks(at: Situation) -> str:
    sizes = {axis: at.decided[axis] for axis in ("tp", "ep", "dp")}
    return " with ".join(f"--{axis} {size}" for axis, size in sizes.items() if size > 1)


def _either(values: tuple[int, ...]) -> str:
    return " or ".join(
        [", ".join(map(str, values[:-1])), str(values[-1])] if len(values) > 1 else map(str, values)
    )
