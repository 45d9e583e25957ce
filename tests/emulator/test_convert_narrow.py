"""cvt to and from fp8, fp6, fp4 and ue8m0 against their definitions on exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from cute_flash.emulator import UnmodelledInstruction

from .definitions import FORMATS, decode, encode
from .evaluate import evaluate
from .values import float_bits

# exponent bits, mantissa bits, bias, largest number
NARROW = {
    "e4m3": (4, 3, 7, 448.0),
    "e5m2": (5, 2, 15, 57344.0),
    "e2m3": (2, 3, 1, 7.5),
    "e3m2": (3, 2, 3, 28.0),
    "e2m1": (2, 1, 1, 6.0),
}
TARGET = "sm_100a"


def value(code: int, name: str) -> float:
    """The number that a pattern stands for."""
    exponent, mantissa, bias, largest = NARROW[name]
    sign = -1.0 if code >> exponent + mantissa else 1.0
    field, fraction = code >> mantissa & (1 << exponent) - 1, code & (1 << mantissa) - 1
    size = math.ldexp(fraction + (field > 0) * (1 << mantissa), max(field, 1) - bias - mantissa)
    if name == "e5m2" and field == 31:
        return math.nan if fraction else sign * math.inf
    return math.nan if size > largest else sign * size


def nearest(number: float, name: str) -> int:
    """The pattern that a number is rounded to, by looking at all of them."""
    exponent, mantissa, _, largest = NARROW[name]
    sign = 1 << exponent + mantissa
    if math.isnan(number):
        return sign - 1
    size = min(Fraction(abs(number)) if math.isfinite(number) else Fraction(largest), Fraction(largest))
    codes = [c for c in range(sign) if value(c, name) <= largest]
    best = min(codes, key=lambda c: (abs(Fraction(value(c, name)) - size), c & 1))
    return best | (sign if math.copysign(1, number) < 0 else 0)


def numbers(name: str, seed: int) -> np.ndarray:
    """float32 patterns: special ones, those near the format's numbers, and the ties between them."""
    exponent, mantissa, _, _ = NARROW[name]
    exact = [value(c, name) for c in range(1 << exponent + mantissa)]
    exact = [v for v in exact if math.isfinite(v)]
    ties = [(p + q) / 2 for p, q in zip(exact, exact[1:], strict=False)]
    values = np.array([*exact, *ties, exact[-1] * 1.05, exact[-1] * 2], np.float32)
    around = np.concatenate([values, np.nextafter(values, np.float32(np.inf)), np.nextafter(values, -values)])
    return np.concatenate([around.view(np.uint32), (-around).view(np.uint32), float_bits("f32", seed)])


def as_float(bits: np.ndarray) -> list[float]:
    return [decode(v, FORMATS["f32"]) for v in bits.tolist()]


def positive(number: float) -> float:
    return number if number > 0 or math.isnan(number) else 0.0


@pytest.mark.parametrize("relu", ["", ".relu"])
@pytest.mark.parametrize("name", NARROW)
def test_from_f32(name, relu):
    """a becomes the upper half."""
    a = numbers(name, 1)
    b = np.random.default_rng(2).permutation(a)
    if name == "e2m1":
        code = f"{{ .reg .b8 %n; cvt.rn.satfinite{relu}.e2m1x2.f32 %n, %a, %b; cvt.u32.u8 %x, %n; }}"
    else:
        code = f"{{ .reg .b16 %n; cvt.rn.satfinite{relu}.{name}x2.f32 %n, %a, %b; cvt.u32.u16 %x, %n; }}"
    (got,) = evaluate(code, a, b, outputs=(np.uint32,), target=TARGET)
    change = positive if relu else lambda v: v
    upper, lower = ([nearest(change(v), name) for v in as_float(w)] for w in (a, b))
    shift = 4 if name == "e2m1" else 8
    assert got.tolist() == [p << shift | q for p, q in zip(upper, lower, strict=True)]


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_from_halves(name):
    a = np.concatenate([float_bits("f16", 3, 512), np.arange(0x5C00, 0x5D00, dtype=np.uint16)])
    (got,) = evaluate(
        f"cvt.rn.satfinite.{name}x2.f16x2 %x, %a;", a.view(np.uint32), outputs=(np.uint16,), target=TARGET
    )
    expected = [nearest(decode(v, FORMATS["f16"]), name) for v in a.tolist()]
    assert got.view(np.uint8).tolist() == expected


@pytest.mark.parametrize("relu", ["", ".relu"])
@pytest.mark.parametrize("name", NARROW)
def test_to_halves(name, relu):
    exponent, mantissa, _, _ = NARROW[name]
    count = 1 << exponent + mantissa + 1
    codes = np.random.default_rng(4).permutation(np.arange(count).repeat(2))
    shift = 4 if name == "e2m1" else 8
    packed = (codes[::2] | codes[1::2] << shift).astype(np.uint16)
    if name == "e2m1":
        code = f"{{ .reg .b8 %n; cvt.u8.u16 %n, %a; cvt.rn{relu}.f16x2.e2m1x2 %x, %n; }}"
    else:
        code = f"cvt.rn{relu}.f16x2.{name}x2 %x, %a;"
    (got,) = evaluate(code, packed, outputs=(np.uint32,), target=TARGET)
    change = positive if relu else lambda v: v
    expected = [encode(change(value(c, name)), FORMATS["f16"]) for c in codes.tolist()]
    assert got.view(np.uint16).tolist() == expected


@pytest.mark.parametrize("mode", ["rz", "rp"])
def test_scales(mode):
    """ue8m0 from f32 and from bf16: the magnitude's power of two, rounded up or down, 2**-127 to 2**127."""

    def scale(number: float) -> int:
        if math.isnan(number):
            return 255
        size = abs(number)
        fits = [e for e in range(-127, 128) if (2.0**e <= size if mode == "rz" else 2.0**e >= size)]
        edge = (-127, 127)[mode == "rp"]
        return (max if mode == "rz" else min)(fits, default=edge) + 127

    a, b = float_bits("f32", 5, 512), float_bits("f32", 6, 512)
    a[:254] = np.arange(1, 255, dtype=np.uint32) << 23
    code = f"cvt.{mode}.satfinite.ue8m0x2.f32 %x, %a, %b;"
    (got,) = evaluate(code, a, b, outputs=(np.uint16,), target=TARGET)
    expected = [scale(p) << 8 | scale(q) for p, q in zip(as_float(a), as_float(b), strict=True)]
    assert got.tolist() == expected
    halves = float_bits("bf16", 7, 512)
    code = f"cvt.{mode}.satfinite.ue8m0x2.bf16x2 %x, %a;"
    (got,) = evaluate(code, halves.view(np.uint32), outputs=(np.uint16,), target=TARGET)
    assert got.view(np.uint8).tolist() == [scale(decode(v, FORMATS["bf16"])) for v in halves.tolist()]


def test_scales_as_bf16():
    a = np.arange(256, dtype=np.uint8).view(np.uint16)
    (got,) = evaluate("cvt.rn.bf16x2.ue8m0x2 %x, %a;", a, outputs=(np.uint32,), target=TARGET)
    expected = [encode(2.0 ** (c - 127), FORMATS["bf16"]) for c in range(255)]
    assert got.view(np.uint16).tolist() == [*expected, 0x7FFF]


@pytest.mark.parametrize(
    "code",
    [
        "cvt.rn.e4m3x2.f32 %x, %a, %b;",
        "cvt.rz.satfinite.e4m3x2.f32 %x, %a, %b;",
        "cvt.rn.satfinite.ue8m0x2.f32 %x, %a, %b;",
        "cvt.rp.satfinite.relu.ue8m0x2.f32 %x, %a, %b;",
        "cvt.rn.satfinite.ftz.e4m3x2.f32 %x, %a, %b;",
        "cvt.rp.ue8m0x2.f32 %x, %a, %b;",
    ],
)
def test_refused(code):
    a = np.zeros(1, np.float32)
    with pytest.raises(UnmodelledInstruction):
        evaluate(code, a, a, outputs=(np.uint16,), target=TARGET)
