"""Rotary settings: one spelling for configs, and llama3 scaling recovered from stored frequency factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isclose, pi
from typing import Any

from lockstep.core.errors import ModelFileError

_PUBLISHED_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_RELATIVE_TOLERANCE = 1e-4


def classic_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with its rotary settings spelled `rope_theta` and `rope_scaling`.

    Newer configs nest both under `rope_parameters`, for Gemma 3 once more by layer type, where the sliding
    layers' theta becomes `rope_local_base_freq`. As in transformers, a `rope_scaling` that says something wins, and
    otherwise what is nested does. Raises ModelFileError for sliding layers whose positions are scaled.
    """
    result = dict(config)
    parameters = config.get("rope_parameters")
    if isinstance(parameters, Mapping):
        sliding = parameters.get("sliding_attention")
        if isinstance(sliding, Mapping):
            if _scaling(sliding) is not None:
                raise ModelFileError("scaled positions in sliding layers (rope_parameters) are not supported")
            if "rope_theta" in sliding:
                result["rope_local_base_freq"] = sliding["rope_theta"]
        scaling = dict(parameters.get("full_attention", parameters))
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in scaling:
                result[name] = scaling.pop(name)
        if not result.get("rope_scaling"):
            result["rope_scaling"] = scaling
    result["rope_scaling"] = _scaling(result.get("rope_scaling"))
    return result


def _scaling(scaling: Any) -> dict[str, Any] | None:
    if not isinstance(scaling, Mapping):
        return None
    settings = dict(scaling)
    kind = settings.pop("type", None)
    settings.setdefault("rope_type", kind)
    return None if settings["rope_type"] in (None, "default") else settings


def llama3_factors(
    frequencies: Sequence[float],
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> list[float]:
    """What each rotary frequency (radians per token) is divided by under Llama 3.1's rule.

    Wavelengths beyond original / low are stretched by `factor`, those below original / high are kept, and the
    ones between are blended linearly in frequency.
    """
    factors = []
    for frequency in frequencies:
        turns = original_max_position_embeddings * frequency / (2 * pi)
        kept = min(1.0, max(0.0, (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)))
        factors.append(1.0 / ((1.0 - kept) / factor + kept))
    return factors


def llama3_scaling(factors: Sequence[float], theta: float) -> dict[str, Any] | None:
    """The `rope_scaling` whose rule gives these stored factors; None when all of them are one.

    GGUF keeps only the factors. Low, high and original enter the rule as two ratios, so low is taken as 1, its
    published value, and the other two follow from any two blended frequencies. Raises ValueError when no
    setting reproduces the factors.
    """
    largest = round(max(factors), 4)
    if largest == 1.0 == round(min(factors), 4):
        return None
    frequencies = [theta ** (-index / len(factors)) for index in range(len(factors))]
    for candidate in (_PUBLISHED_LLAMA3, _fit(factors, frequencies)):
        if candidate is None:
            continue
        expected = llama3_factors(frequencies, factor=largest, **candidate)
        if all(isclose(a, b, rel_tol=_RELATIVE_TOLERANCE) for a, b in zip(factors, expected, strict=True)):
            return {"rope_type": "llama3", "factor": largest, **candidate}
    raise ValueError("the factors do not follow the llama3 rule")


def _fit(factors: Sequence[float], frequencies: Sequence[float]) -> dict[str, Any] | None:
    largest = max(factors)
    margin = 1.0 + _RELATIVE_TOLERANCE
    blended = [pair for pair in zip(factors, frequencies, strict=True) if margin < pair[0] < largest / margin]
    if len(blended) < 2:
        return None
    (high_factor, high), (low_factor, low) = blended[0], blended[-1]
    kept_high = (1 / high_factor - 1 / largest) / (1 - 1 / largest)
    kept_low = (1 / low_factor - 1 / largest) / (1 - 1 / largest)
    slope = (kept_high - kept_low) / (high - low)
    width = slope * high - kept_high
    if width <= 0:
        return None
    return {
        "low_freq_factor": 1.0,
        "high_freq_factor": round(1.0 + 1.0 / width, 4),
        "original_max_position_embeddings": round(2 * pi * slope / width),
    }
