"""Contract of fused_moe."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lockstep.ops.cases import DTYPES, normal, strided
from lockstep.ops.contract import FLOAT32_UNIT, Argument, Case, Contract, Workload, rounded
from lockstep.ops.fused_moe.reference import fused_moe

_Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

# Tokens, experts per token, experts, model width, inner width.
_SHAPES = (
    (1, 4, 16, 64, 48),
    (5, 2, 4, 96, 33),
    (50, 4, 8, 64, 40),
    (3, 1, 2, 577, 16),
    (2, 3, 6, 64, 512),
    (0, 2, 4, 64, 32),
)

_MOST_SUMMED = 577


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for shape in _SHAPES:
            yield _case(dtype, shape)
        yield _case(dtype, (17, 4, 8, 64, 32), share_elsewhere=0.5)
        yield _case(dtype, (3, 2, 4, 64, 32), share_elsewhere=1.0)
        yield _case(dtype, (6, 2, 4, 64, 32), is_strided=True)
        yield _case(dtype, (2, 2, 3, 16384, 24))
        yield _case(dtype, (3, 2, 4, 64, 32), size=0.0)
        yield _case(dtype, (3, 2, 4, 64, 32), size=4096.0)


def _case(
    dtype: torch.dtype,
    shape: tuple[int, int, int, int, int],
    *,
    share_elsewhere: float = 0.0,
    is_strided: bool = False,
    size: float = 1.0,
) -> Case:
    """`size` is that of the tokens' values; the first product makes size one of it again.

    Of wide tokens no more than `_MOST_SUMMED` values, spread over the whole width, are not zero.
    """
    tokens, top_k, experts, width, inner = shape

    def make(g: torch.Generator) -> _Arguments:
        hidden = normal(g, tokens, width, dtype=dtype, scale=size)
        hidden *= torch.arange(width) % -(-width // _MOST_SUMMED) == 0
        scale = min(width, _MOST_SUMMED) ** -0.5 / (size or 1.0)
        gate_up = normal(g, experts, 2 * inner, width, dtype=dtype, scale=scale)
        down = normal(g, experts, width, inner, dtype=dtype, scale=inner**-0.5)
        weights = torch.rand(tokens, top_k, generator=g)
        ids = torch.rand(tokens, experts, generator=g).argsort(-1)[:, :top_k].to(torch.int32)
        ids = ids.masked_fill(torch.rand(ids.shape, generator=g) < share_elsewhere, -1)
        return strided(hidden) if is_strided else hidden, gate_up, down, weights, ids

    name = f"{dtype} {tokens} tokens, {top_k} of {experts}, {width}x{inner}, {share_elsewhere} elsewhere"
    return Case(
        f"{name}{' strided' * is_strided}{f' size {size:g}' * (size != 1)}",
        {"dtype": dtype, "experts": experts, "top_k": top_k, "width": width, "inner": inner},
        make,
    )


def _gate_and_up_swapped(
    hidden: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    return fused_moe(hidden, torch.cat(gate_up.chunk(2, 1)[::-1], 1), down, weights, ids)


def _weighted_before(
    hidden: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """The weight on the activation's input instead of the output, as some models want it."""
    rows = (hidden.repeat_interleave(ids.shape[1], 0) * weights.flatten()[:, None]).to(hidden.dtype)
    ones = torch.ones_like(weights).view(-1, 1)
    out = fused_moe(rows, gate_up, down, ones, ids.view(-1, 1))
    return out.unflatten(0, ids.shape).sum(1)


def _last_choice_dropped(
    hidden: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    return fused_moe(hidden, gate_up, down, weights[:, :-1], ids[:, :-1])


def _unweighted(
    hidden: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    return fused_moe(hidden, gate_up, down, torch.ones_like(weights), ids)


def _others_kept(
    hidden: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    return fused_moe(hidden, gate_up, down, weights, ids.clamp(min=0))


def _down_of_the_next(
    hidden: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    return fused_moe(hidden, gate_up, down.roll(1, 0), weights, ids)


def _timed(tokens: int) -> Case:
    return _case(torch.bfloat16, (tokens, 8, 64, 2048, 768))


def _flops(hidden: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, *routing: torch.Tensor) -> int:
    return 2 * routing[-1].numel() * (gate_up[0].numel() + down[0].numel())


def _moved(hidden: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, *routing: torch.Tensor) -> int:
    """Weights of experts that were chosen are read once, each token once, and its sum written."""
    num_read = len(routing[-1].unique())
    return 2 * hidden.nbytes + num_read * (gate_up[0].nbytes + down[0].nbytes)


CONTRACT = Contract(
    name="fused_moe",
    summary="weighted sum of each token's experts: down(silu(gate(x)) * up(x))",
    arguments=(
        Argument("hidden", ("token", "width")),
        Argument("gate_up", ("expert", "2 * inner", "width"), constant=True, note="gate, then up"),
        Argument("down", ("expert", "width", "inner"), constant=True),
        Argument("weights", ("token", "choice"), note="float32"),
        Argument(
            "ids",
            ("token", "choice"),
            note="int32; none twice for a token, but -1 for experts of other ranks, which add nothing",
        ),
    ),
    returns=("out[token, width]",),
    rounding="to the dtype after each product and the activation, or later; the sum over a token's experts in float32",
    signature=("dtype", "experts", "top_k", "width", "inner"),
    reference=fused_moe,
    cases=_cases,
    # The result rounds once. Before it, gate, up, activation and their product each round values of size one to the
    # dtype; the second product averages them out: five roundings of a term give a deviation of sqrt(5 / 3) half
    # units of an output of size one, and each of up to four weighted outputs one more. Activations are products, whose
    # size differs from token to token, so that six sigmas are needed: 16 half units of the sum. (Of 1,500 seeds the
    # most seen is 12.) float32 sums walk as in linear, over 577 and 512 terms.
    tolerance=rounded(1, maths=4, inside=16.0, absolute=8 * (_MOST_SUMMED / 2) ** 0.5 * FLOAT32_UNIT),
    mutants={
        "gate and up swapped": _gate_and_up_swapped,
        "weighted before the experts": _weighted_before,
        "last choice dropped": _last_choice_dropped,
        "unweighted": _unweighted,
        "pairs of other ranks kept": _others_kept,
        "down of the next expert": _down_of_the_next,
    },
    workload=Workload(
        "tokens, 8 of 64 experts of 2048 x 768, bfloat16", (1, 16, 256, 1024, 4096), _timed, _moved, _flops
    ),
)
