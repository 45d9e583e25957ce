"""Floating-point formats by their definition, on exact fractions: what the emulator's arrays are compared
with.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple


class Format(NamedTuple):
    """precision: significand bits with the hidden one. low, high: exponents of normal numbers."""

    bits: int
    precision: int
    low: int
    high: int


F16 = Format(16, 11, -14, 15)
BF16 = Format(16, 8, -126, 127)
F32 = Format(32, 24, -126, 127)
F64 = Format(64, 53, -1022, 1023)
E4M3 = Format(8, 4, -6, 8)  # as far as numbers go: the largest exponent has numbers too
E5M2 = Format(8, 3, -14, 15)
FORMATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64, "e4m3": E4M3, "e5m2": E5M2}
NAN = {16: 0x7FFF, 32: 0x7FFFFFFF, 64: 0x7FF8000000000000}


def decode(bits: int, form: Format) -> float:
    """The number a bit pattern stands for; every format here fits into a Python float."""
    field = form.bits - form.precision
    sign = -1.0 if bits >> form.bits - 1 else 1.0
    exponent = bits >> form.precision - 1 & (1 << field) - 1
    mantissa = bits & (1 << form.precision - 1) - 1
    if exponent == (1 << field) - 1:
        return math.nan if mantissa else sign * math.inf
    if exponent:
        mantissa |= 1 << form.precision - 1
    return sign * math.ldexp(mantissa, max(exponent, 1) - 1 + form.low - form.precision + 1)


def encode(value: Fraction | float, form: Format, mode: str = "rn", zero_sign: int = 0) -> int:
    """Bit pattern of a number rounded to a format in mode rn, rna, rz, rm or rp; zero_sign for an exact
    zero.
    """
    if isinstance(value, float):
        if math.isnan(value):
            return NAN[form.bits]
        if math.isinf(value):
            return infinity(form) | (value < 0) << form.bits - 1
        zero_sign = zero_sign or int(math.copysign(1, value) < 0)
        value = Fraction(value)
    if value == 0:
        return zero_sign << form.bits - 1
    negative, size = value < 0, abs(value)
    exponent = max(_log2(size), form.low)
    units = size / Fraction(2) ** (exponent - form.precision + 1)
    whole, rest = int(units), units - int(units)
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole & 1),
        "rna": rest >= Fraction(1, 2),
        "rz": False,
        "rm": rest > 0 and negative,
        "rp": rest > 0 and not negative,
    }[mode]
    whole += int(up)
    if whole == 1 << form.precision:
        whole, exponent = whole >> 1, exponent + 1
    sign = int(negative) << form.bits - 1
    if exponent > form.high:
        stays = mode == "rz" or (mode == "rm" and not negative) or (mode == "rp" and negative)
        return sign | infinity(form) - int(stays)
    hidden = 1 << form.precision - 1
    if whole < hidden:
        return sign | whole
    return sign | exponent - form.low + 1 << form.precision - 1 | whole - hidden


def infinity(form: Format) -> int:
    """The pattern of +inf."""
    return (1 << form.bits - form.precision) - 1 << form.precision - 1


def _log2(size: Fraction) -> int:
    """floor(log2(size))."""
    guess = size.numerator.bit_length() - size.denominator.bit_length()
    return guess if Fraction(2) ** guess <= size else guess - 1


def fused(a: float, b: float, c: float, form: Format, mode: str = "rn") -> int:
    """Pattern of a * b + c rounded once, with IEEE 754's special cases."""
    if not all(map(math.isfinite, (a, b, c))):
        special = a * b + c
        return encode(special, form) if not math.isfinite(special) else encode(c, form)
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    signs = {math.copysign(1, a) * math.copysign(1, b) < 0, math.copysign(1, c) < 0}
    zero_sign = int(signs == {True} or (len(signs) == 2 and mode == "rm"))
    return encode(exact, form, mode, zero_sign)


def flushed(bits: int, form: Format) -> int:
    """A pattern with subnormal numbers made zeros of the same sign."""
    sign = bits & 1 << form.bits - 1
    return sign if bits ^ sign < 1 << form.precision - 1 else bits
