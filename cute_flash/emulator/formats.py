"""Number formats: conversions between numpy types and the formats numpy does not have, with PTX's rounding
modes.

Rounding to a narrower format goes through float64 made "sticky": where a result is not exact its last bit
is 1, so that one further rounding in any direction is right (the narrow format must be at least two bits
narrower than float64).
"""

from __future__ import annotations

import numpy as np

CANONICAL_NAN = {16: 0x7FFF, 32: 0x7FFFFFFF, 64: 0x7FF8000000000000}


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """uint16 bf16 patterns -> float32, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: np.ndarray, mode: str = "rn") -> np.ndarray:
    """float32 -> uint16 bf16 patterns, rounded to nearest even (rn) or toward zero (rz). NaN becomes
    0x7fff.
    """
    bits = np.ascontiguousarray(values).view(np.uint32)
    if mode == "rn":
        rounded = (bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))) >> np.uint32(16)
    elif mode == "rz":
        rounded = bits >> np.uint32(16)
    else:
        raise ValueError(f"rounding mode {mode}")
    result = rounded.astype(np.uint16)
    nan = values != values
    if np.count_nonzero(nan):
        result[nan] = CANONICAL_NAN[16]
    return result


def sticky_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b of float64 arrays, rounded to odd: when it is not exact the last bit is 1."""
    total = a + b
    other = total - a
    error = (a - (total - other)) + (b - other)
    inexact = (error != 0) & np.isfinite(total)
    if not np.count_nonzero(inexact):
        return total
    even = (total.view(np.int64) & 1) == 0
    away = np.where(error > 0, np.inf, -np.inf)
    return np.where(inexact & even, np.nextafter(total, away), total)


def round_f32(exact: np.ndarray, mode: str) -> np.ndarray:
    """float64 (exact or sticky) -> float32 in mode rn, rz, rm or rp."""
    near = exact.astype(np.float32)
    if mode == "rn":
        return near
    back = near.astype(np.float64)
    if mode == "rz":
        wrong, toward = np.abs(back) > np.abs(exact), np.float32(0)
    elif mode == "rm":
        wrong, toward = back > exact, np.float32(-np.inf)
    else:
        wrong, toward = back < exact, np.float32(np.inf)
    return np.where(wrong, np.nextafter(near, toward), near)


def flush(values: np.ndarray) -> np.ndarray:
    """float32 with subnormal numbers replaced by zeros of the same sign (.ftz)."""
    small = np.abs(values) < np.float32(2.0**-126)
    if not np.count_nonzero(small):
        return values
    return np.where(small, np.copysign(np.float32(0), values), values)


def saturate(values: np.ndarray) -> np.ndarray:
    """Clamp to [0, 1]; NaN becomes +0 (.sat)."""
    return np.where(np.isnan(values), values.dtype.type(0), np.clip(values, 0, 1)).astype(values.dtype) + 0


def to_odd_f32(exact: np.ndarray) -> np.ndarray:
    """float64 -> float32 rounded to odd, so that a further rounding to a narrower format is right."""
    cut = round_f32(exact, "rz")
    inexact = (cut.astype(np.float64) != exact) & np.isfinite(cut)
    bits = np.ascontiguousarray(cut).view(np.uint32)
    return np.where(inexact, bits | np.uint32(1), bits).view(np.float32)
