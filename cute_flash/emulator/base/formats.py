"""Number formats: conversions between numpy types and the formats numpy does not have, with PTX's rounding
modes.

Rounding to a narrower format goes through float64 made "sticky": where a result is not exact its last bit
is 1, so that one further rounding in any direction is right (the narrow format must be at least two bits
narrower than float64).
"""

from __future__ import annotations

from functools import cache

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


# Formats of matrix operands narrower than 16 bits: bits, exponent bits, exponent bias, and which patterns
# are no numbers. "ieee": as in IEEE 754; "fn": only all ones is NaN and there is no infinity; "": all are.
NARROW = {
    "e5m2": (8, 5, 15, "ieee"),
    "e4m3": (8, 4, 7, "fn"),
}
_MATRIX_BITS = {"f16": 16, "bf16": 16} | {name: form[0] for name, form in NARROW.items()}


def matrix_bits(kind: str) -> int:
    """Bits of an element of a matrix operand's type."""
    return _MATRIX_BITS[kind]


@cache
def narrow_table(kind: str) -> np.ndarray:
    """float32 value of every pattern of a format of NARROW, exact (PTX ISA, alternate floating point)."""
    bits, exponent_bits, bias, special = NARROW[kind]
    pattern = np.arange(1 << bits)
    mantissa_bits = bits - 1 - exponent_bits
    top = (1 << exponent_bits) - 1
    exponent = pattern >> mantissa_bits & top
    mantissa = pattern & (1 << mantissa_bits) - 1
    significand = np.where(exponent > 0, mantissa + (1 << mantissa_bits), mantissa)
    value = np.ldexp(significand.astype(np.float64), np.maximum(exponent, 1) - bias - mantissa_bits)
    if special == "ieee":
        value = np.where(exponent == top, np.where(mantissa > 0, np.nan, np.inf), value)
    elif special == "fn":
        all_ones = (1 << mantissa_bits) - 1
        value = np.where((exponent == top) & (mantissa == all_ones), np.nan, value)
    table = np.where(pattern >> bits - 1, -value, value).astype(np.float32)
    table.flags.writeable = False
    return table


def matrix_values(raw: np.ndarray, kind: str) -> np.ndarray:
    """Elements of a matrix operand, unsigned of its width, as float32: exact."""
    if kind == "bf16":
        return np.left_shift(raw, np.uint32(16), dtype=np.uint32).view(np.float32)
    if kind == "f16":
        return raw.view(np.float16).astype(np.float32)
    return narrow_table(kind).take(raw)
