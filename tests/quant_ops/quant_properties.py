"""What every quantiser must do, in maths of its own: numpy, a table of the e4m3 codes, and properties.

Each check takes a function with the contract's arguments and the device to run it on, and asserts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

Quantise = Callable[[torch.Tensor, int, bool, bool], tuple[torch.Tensor, torch.Tensor]]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIMITS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def e4m3_table() -> np.ndarray:
    """The values of the codes 0 to 126 (0x7e), from the format: 4 bits of exponent with bias 7, 3 of mantissa."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)


def e4m3_bits(values: np.ndarray) -> np.ndarray:
    """The nearest codes of float64 values up to 448, the even one of two as near."""
    table = e4m3_table()
    size = np.abs(values.astype(np.float64))
    above = np.searchsorted(table, size).clip(1, 126)
    to_above, to_below = table[above] - size, size - table[above - 1]
    nearest = np.where((to_above < to_below) | ((to_above == to_below) & (above % 2 == 0)), above, above - 1)
    return (nearest + 128 * np.signbit(values)).astype(np.uint8)


def expected(x: torch.Tensor, group: int, dtype: torch.dtype, ue8m0: bool) -> tuple[np.ndarray, np.ndarray]:
    """(bits of the codes, scales) of finite x, by numpy's IEEE arithmetic in float32."""
    groups = x.float().cpu().numpy().reshape(*x.shape[:-1], -1, group)
    limit = np.float32(LIMITS[dtype])
    scale = np.maximum(np.abs(groups).max(-1), limit * np.float32(2.0**-40)) / limit
    if ue8m0:
        mantissa, exponent = np.frexp(scale)
        scale = np.ldexp(np.float32(1), exponent - (mantissa == 0.5)).astype(np.float32)
    scaled = groups * (np.float32(1) / scale)[..., None]
    assert scaled.dtype == scale.dtype == np.float32
    bits = e4m3_bits(scaled) if dtype == torch.float8_e4m3fn else np.rint(scaled).astype(np.int8).view(np.uint8)
    return bits.reshape(x.shape), scale


def check_bits(quantise: Quantise, device: str, seed: int) -> None:
    """Codes and scales are those of numpy to the last bit, over 60 orders of magnitude where the dtype has them."""
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    for dtype in DTYPES:
        most = 15 if dtype == torch.float16 else 100
        powers = torch.randint(-most, most, (12, 4, 1), generator=generator).expand(12, 4, 128).flatten(1)
        x = (torch.randn(12, 512, generator=generator).clamp(-1.9, 1.9) * powers.double().exp2()).to(dtype)
        for ue8m0 in (False, True):
            codes, scale = quantise(x.to(device), 128, False, ue8m0)
            bits, scales = expected(x, 128, codes.dtype, ue8m0)
            assert np.array_equal(scale.cpu().numpy(), scales), f"{dtype} {ue8m0=}"
            assert np.array_equal(codes.view(torch.uint8).cpu().numpy(), bits), f"{dtype} {ue8m0=}"


def check_every_code(quantise: Quantise, device: str) -> None:
    """With the scale 1, every code, every middle of two and both neighbours of every middle round as the table says."""
    dtype = quantise(torch.ones(1, 128, device=device), 128, False, False)[0].dtype
    table = e4m3_table() if dtype == torch.float8_e4m3fn else np.arange(128.0)
    middles = ((table[1:] + table[:-1]) / 2).astype(np.float32)
    points = [table, middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(1e9))]
    values = np.concatenate(points).astype(np.float32)
    values = np.concatenate([values, -values])
    rows = np.full((-(-len(values) // 127), 128), LIMITS[dtype], dtype=np.float32)
    rows[:, :127] = np.resize(values, (len(rows), 127))
    codes, scale = quantise(torch.from_numpy(rows).to(device), 128, False, False)
    bits, _ = expected(torch.from_numpy(rows), 128, dtype, False)
    assert bool((scale == 1).all())
    assert np.array_equal(codes.view(torch.uint8).cpu().numpy(), bits)


def check_bad_values(quantise: Quantise, device: str) -> None:
    """A group with a NaN or an infinity has the scale NaN, codes NaN or 0; its neighbours are as without it."""
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        for bad in (math.nan, -math.nan, math.inf, -math.inf):
            for ue8m0 in (False, True):
                good = torch.randn(3, 256, generator=generator).to(dtype)
                x = good.clone()
                x[1, 130] = bad
                codes, scale = (out.cpu() for out in quantise(x.to(device), 128, False, ue8m0))
                good_codes, good_scale = (out.cpu() for out in quantise(good.to(device), 128, False, ue8m0))
                assert bool(scale[1, 1].isnan()) and int(scale.isnan().sum()) == 1
                spoilt = codes[1, 128:].float()
                assert bool(spoilt.isnan().all() if codes.dtype.is_floating_point else (spoilt == 0).all())
                good_codes[1, 128:], good_scale[1, 1] = codes[1, 128:], scale[1, 1]
                assert torch.equal(codes.view(torch.uint8), good_codes.view(torch.uint8))
                assert torch.equal(scale.nan_to_num(), good_scale.nan_to_num())


def check_layout(quantise: Quantise, device: str) -> None:
    """Strides are what the contract says, for two and three dims; both layouts hold the same numbers."""
    generator = torch.Generator().manual_seed(0)
    for shape, padded in (((5, 384), 8), ((8, 384), 8), ((2, 3, 384), 8), ((1, 384), 4), ((0, 384), 0)):
        x = torch.randn(*shape, generator=generator).to(device)
        codes, rows = quantise(x, 128, False, False)
        same_codes, columns = quantise(x, 128, True, False)
        assert (
            rows.shape == columns.shape == (*shape[:-1], 3) and rows.is_contiguous() and codes.is_contiguous()
        )
        assert torch.equal(codes.view(torch.uint8), same_codes.view(torch.uint8)) and torch.equal(rows, columns)
        if columns.numel():
            assert columns.stride()[-2:] == (1, padded), columns.stride()
        if len(shape) == 3:
            assert columns.stride(0) == shape[1]
    codes, rows = quantise(torch.randn(384, 5, generator=generator).to(device).T, 128, False, False)
    assert codes.is_contiguous() and rows.is_contiguous()


def check_error(quantise: Quantise, device: str, seed: int) -> None:
    """codes * scale is off by half a code at most: 2^-4 of the value (or 2^-10 codes) in e4m3, half a scale in int8."""
    print(f"seed {seed}")
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(seed))
    for ue8m0 in (False, True):
        codes, scale = (out.cpu().double() for out in quantise(x.to(device), 64, False, ue8m0))
        scale = scale.repeat_interleave(64, 1)
        error = (codes * scale - x).abs()
        is_fp8 = quantise(x[:1].to(device), 64, False, False)[0].dtype == torch.float8_e4m3fn
        accepted = torch.maximum(x.double().abs() / 16, scale / 1024) if is_fp8 else scale / 2
        # Product and reciprocal are off by a unit of float32 each.
        share = float((error / (accepted + x.abs() * 2.0**-22)).max())
        assert 0.9 < share <= 1, share


def check_all(quantise: Quantise, device: str, seed: int) -> None:
    """Every property of a group quantiser."""
    check_bits(quantise, device, seed)
    check_every_code(quantise, device)
    check_bad_values(quantise, device)
    check_layout(quantise, device)
    check_error(quantise, device, seed)
