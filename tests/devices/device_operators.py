"""The operators in groups, and how one is checked on a device.

A file is what a run shares out over processes and machines, so each group has a file of its own, and operators whose
cases take minutes to compile one each. An operator that no group names is in the group "others".
"""

from __future__ import annotations

import secrets

from lockstep.ops.check import check_kernels
from lockstep.ops.registry import contracts
from lockstep.ops.suite import device_with_values, select
from lockstep.platforms.registry import load_platform

GROUPS = {
    "attention": ("attention_decode", "decoder_decode", "kv_store", "norm_rope_attention_decode"),
    "attention_extend": ("attention_extend",),
    "attention_shared": ("attention_decode_shared",),
    "elementwise": ("gelu_and_mul", "rope", "silu_and_mul"),
    "experts": ("fused_moe", "grouped_gemm", "moe_align"),
    "norms": ("add_rms_norm", "layer_norm", "rms_norm", "var_rms_norm"),
    "quantised": (
        "per_token_group_quant_fp8",
        "per_token_group_quant_int8",
        "per_token_quant_fp8",
        "scaled_mm_fp8",
    ),
    "routing_sigmoid": ("moe_topk_sigmoid",),
    "routing_softmax": ("moe_topk_softmax",),
}


def operators(group: str) -> list[str]:
    """Names of the operators of a group."""
    known = contracts()
    named = [op for ops in GROUPS.values() for op in ops]
    assert set(named) <= set(known) and len(named) == len(set(named)), (
        "a group names what is no operator, or twice"
    )
    return list(GROUPS[group]) if group in GROUPS else sorted(set(known) - set(named))


def fresh_seed() -> int:
    """Another one every time, printed."""
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    return seed


def assert_meets_contract(op: str, platform: str) -> None:
    """Every kernel that can run on the platform's device, on all cases of the contract."""
    seed = fresh_seed()
    print(f"lockstep ops check --op {op} --platform {platform} --seed {seed}")
    family = load_platform(platform)
    (selected,) = select(family.capabilities(), op=op)
    reports = check_kernels(selected.contract, selected.kernels, seed=seed, device=device_with_values(family))
    for kernel in reports:
        print(
            f"{kernel.provider}: {kernel.num_cases} cases, worst {kernel.worst_share:.2f} in {kernel.worst_case}"
        )
    failures = [f"{kernel.provider}: {text}" for kernel in reports for text in kernel.failures]
    assert reports and all(kernel.passed for kernel in reports), "\n".join(failures) or "nothing ran"
