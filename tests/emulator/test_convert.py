"""cvt against its definition, for every pair of types and rounding mode that PTX has."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from cute_flash.emulator import UnmodelledInstruction

from .definitions import FORMATS, decode, encode, flushed
from .evaluate import evaluate
from .test_floating import check, decoded
from .test_integer import clamp, dtype, wrap
from .values import float_bits, integers

INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
ROUND = {
    "rni": lambda v: round(v),
    "rzi": math.trunc,
    "rmi": math.floor,
    "rpi": math.ceil,
}


def narrow_input(kind: str, seed: int) -> np.ndarray:
    """Integers of `kind` in the narrowest register that PTX has."""
    values = integers(kind, seed)
    return values if values.itemsize > 1 else values.astype(f"{values.dtype.kind}2")


def register(kind: str) -> np.dtype:
    """Type of the register that receives a `kind`."""
    return dtype(kind) if kind[1:] != "8" else np.dtype(f"{'i' if kind[0] == 's' else 'u'}2")


@pytest.mark.parametrize("to", INTEGERS)
@pytest.mark.parametrize("source", INTEGERS)
def test_between_integers(source, to):
    a = narrow_input(source, 0)
    (got,) = evaluate(f"cvt.{to}.{source} %x, %a;", a, outputs=(register(to),))
    assert got.tolist() == [wrap(v, to) for v in a.tolist()]
    (got,) = evaluate(f"cvt.sat.{to}.{source} %x, %a;", a, outputs=(register(to),))
    assert got.tolist() == [clamp(v, to) for v in a.tolist()]


def test_wider_registers():
    a = integers("u64", 1)
    (got,) = evaluate("cvt.s32.s16 %x, %a;", a, outputs=(np.int32,))
    assert got.tolist() == [wrap(v, "s16") for v in a.tolist()]
    (got,) = evaluate("cvt.s16.s32 %x, %a;", a.astype(np.uint32), outputs=(np.int64,))
    assert got.tolist() == [wrap(v & 0xFFFF, "s16") for v in a.tolist()]


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("to", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("source", INTEGERS)
def test_integer_to_float(source, to, mode):
    form, a = FORMATS[to], narrow_input(source, 2)
    code = f"cvt.{mode}.{to}.{source} %x, %a;"
    if mode in {"f16": ("rm", "rp"), "bf16": ("rm", "rp"), "f32": (), "f64": ("rz", "rm", "rp")}[to]:
        with pytest.raises(UnmodelledInstruction):
            evaluate(code, a, outputs=(np.dtype(f"u{form.bits // 8}"),))
        return
    (got,) = evaluate(code, a, outputs=(np.dtype(f"u{form.bits // 8}"),), target="sm_90")
    check(got.tolist(), [encode(Fraction(v), form, mode) for v in a.tolist()], to, a)


def to_integer(value: float, kind: str, mode: str, source: str) -> int:
    if math.isnan(value):
        wide = source == "f64" or kind in ("s64", "u64")
        return wrap(1 << int(kind[1:]) - 1, kind) if wide else 0
    if math.isinf(value):
        return clamp(int(math.copysign(1 << 70, value)), kind)
    return clamp(ROUND[mode](value), kind)


@pytest.mark.parametrize("mode", ROUND)
@pytest.mark.parametrize("to", INTEGERS)
@pytest.mark.parametrize("source", ["f16", "bf16", "f32", "f64"])
def test_float_to_integer(source, to, mode):
    a = float_bits(source, 3, 384)
    near = np.array(
        [encode(Fraction(v), FORMATS[source]) for v in [0.5, 1.5, -0.5, -2.5, 2.5, 127.5, -128.5, 255.5]]
    )
    a[-8:] = near.astype(a.dtype)
    (got,) = evaluate(f"cvt.{mode}.{to}.{source} %x, %a;", a, outputs=(register(to),), target="sm_90")
    expected = [to_integer(v, to, mode, source) for v in decoded(source, a)]
    assert got.tolist() == expected


@pytest.mark.parametrize("mode", ROUND)
def test_to_whole_number(mode):
    for kind in ("f16", "f32", "f64"):
        a, form = float_bits(kind, 4), FORMATS[kind]
        (got,) = evaluate(f"cvt.{mode}.{kind}.{kind} %x, %a;", a, outputs=(a.dtype,))
        expected = [
            encode(v, form) if not math.isfinite(v) or v == 0
            else encode(Fraction(ROUND[mode](v)), form, zero_sign=int(v < 0))
            for v in decoded(kind, a)
        ]  # fmt: skip
        check(got.tolist(), expected, kind, a)


@pytest.mark.parametrize(
    ("to", "source", "modes"),
    [
        ("f16", "f32", ("rn", "rz")),
        ("bf16", "f32", ("rn", "rz")),
        ("f16", "f64", ("rn", "rz")),
        ("f32", "f64", ("rn", "rz", "rm", "rp")),
        ("f32", "f16", ("",)),
        ("f32", "bf16", ("",)),
        ("f64", "f32", ("",)),
        ("f64", "f16", ("",)),
    ],
)
def test_between_floats(to, source, modes):
    a, form = float_bits(source, 5, 2048), FORMATS[to]
    # Ties of the narrower format.
    a[:256] = (a[:256].astype(np.uint64) & ~np.uint64(0x1FFF) | np.uint64(0x1000)).astype(a.dtype)
    for mode in modes:
        dot = f".{mode}" if mode else ""
        code = f"cvt{dot}.{to}.{source} %x, %a;"
        (got,) = evaluate(code, a, outputs=(np.dtype(f"u{form.bits // 8}"),), target="sm_90")
        check(got.tolist(), [encode(v, form, mode or "rn") for v in decoded(source, a)], to, a)


def test_flushing_and_clamping():
    form, a = FORMATS["f32"], float_bits("f32", 6)
    (got,) = evaluate("cvt.rn.ftz.f16.f32 %x, %a;", a, outputs=(np.uint16,))
    expected = [encode(decode(flushed(v, form), form), FORMATS["f16"]) for v in a.tolist()]
    check(got.tolist(), expected, "f16", a)
    (got,) = evaluate("cvt.sat.f32.f32 %x, %a;", a, outputs=(np.uint32,))
    limit = lambda v: 0.0 if math.isnan(v) else min(max(v, 0.0), 1.0)  # noqa: E731
    assert got.tolist() == [encode(limit(v) + 0.0, form) for v in decoded("f32", a)]
    (got,) = evaluate("cvt.ftz.f64.f32 %x, %a;", a, outputs=(np.uint64,))
    expected = [encode(decode(flushed(v, form), form), FORMATS["f64"]) for v in a.tolist()]
    check(got.tolist(), expected, "f64", a)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("relu", ["", ".relu"])
def test_packed(kind, mode, relu):
    """cvt.rn.bf16x2.f32 d, a, b: a becomes the upper half."""
    form, a, b = FORMATS[kind], float_bits("f32", 7, 512), float_bits("f32", 8, 512)
    (got,) = evaluate(f"cvt.{mode}{relu}.{kind}x2.f32 %x, %a, %b;", a, b, outputs=(np.uint32,))

    def one(value: float) -> int:
        return encode(value if not relu or value > 0 or math.isnan(value) else 0.0, form, mode)

    lower = [one(v) for v in decoded("f32", b)]
    upper = [one(v) for v in decoded("f32", a)]
    check((got & np.uint32(0xFFFF)).tolist(), lower, kind, a, b)
    check((got >> np.uint32(16)).tolist(), upper, kind, a, b)


def test_nan_becomes_the_canonical_one():
    nan = np.array([0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0xFFC12345], np.uint32)
    for kind, dot in (("f16", ".rn"), ("bf16", ".rn")):
        (got,) = evaluate(f"cvt{dot}.{kind}.f32 %x, %a;", nan, outputs=(np.uint16,), target="sm_90")
        assert (got == 0x7FFF).all(), kind


@pytest.mark.parametrize("mode", ["rna", "rn", "rz"])
def test_tf32(mode):
    a = float_bits("f32", 9)
    (got,) = evaluate(f"cvt.{mode}.tf32.f32 %x, %a;", a, outputs=(np.uint32,), target="sm_90")
    form = FORMATS["f32"]._replace(bits=19, precision=11)
    for bits, result in zip(a.tolist(), got.tolist(), strict=True):
        value = decode(bits, FORMATS["f32"])
        if math.isnan(value):
            assert math.isnan(decode(result, FORMATS["f32"]))
        elif math.isinf(value):
            assert result == bits
        else:
            assert result == encode(value, form, mode) << 13, hex(bits)


LARGEST = {"f16": 0x7BFF, "bf16": 0x7F7F}


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("relu", ["", ".relu"])
@pytest.mark.parametrize("kind", LARGEST)
def test_finite_saturation(kind, relu, mode):
    """Numbers beyond the largest one, infinities among them, become that one; NaN stays NaN."""
    form, bits = FORMATS[kind], float_bits("f32", 11)
    edges = [0x7F7FFFFF, 0xFF7FFFFF, 0x477FE000, 0x477FEFFF, 0x477FF000, 0x7F7F7FFF, 0x7F7F8000]
    bits[: len(edges)] = edges
    a, b = bits.view(np.float32), bits[::-1].copy().view(np.float32)

    def expected(value: float) -> int:
        if math.isnan(value):
            return 0x7FFF
        if relu and not value > 0:
            return 0
        most = decode(LARGEST[kind], form)
        return encode(min(max(value, -most), most), form, mode)

    (got,) = evaluate(f"cvt.{mode}{relu}.satfinite.{kind}x2.f32 %x, %a, %b;", a, b, outputs=(np.uint32,))
    assert got.tolist() == [expected(float(u)) << 16 | expected(float(v)) for u, v in zip(a, b, strict=True)]
    (got,) = evaluate(f"cvt.{mode}{relu}.satfinite.{kind}.f32 %x, %a;", a, outputs=(np.uint16,))
    assert got.tolist() == [expected(float(u)) for u in a]


def test_tf32_saturates_and_rectifies():
    a = np.array([np.inf, -np.inf, 3.4e38, -3.4028235e38, -0.0, -1.5, 1.5, np.nan], np.float32)
    most, sign, nan = 0x7F7FE000, 1 << 31, 0x7FFFFFFF
    forms = {
        "rna.satfinite": [most, most | sign, 0x7F7FC000, most | sign, sign, 0xBFC00000, 0x3FC00000, nan],
        "rn.relu": [0x7F800000, 0, 0x7F7FC000, 0, 0, 0, 0x3FC00000, nan],
        "rz.satfinite.relu": [most, 0, 0x7F7FC000, 0, 0, 0, 0x3FC00000, nan],
    }
    for form, expected in forms.items():
        (got,) = evaluate(f"cvt.{form}.tf32.f32 %x, %a;", a, outputs=(np.uint32,))
        assert got.tolist() == expected, form


@pytest.mark.parametrize("form", ["rn.satfinite.f32.f32", "rn.satfinite.bf16.f64", "rn.satfinite.f16.s32",
                                  "rna.relu.tf32.f32", "rn.sat.bf16x2.f32"])  # fmt: skip
def test_saturations_that_there_are_not(form):
    a = np.zeros(4, {"f64": np.float64, "s32": np.int32}.get(form[-3:], np.float32))
    size = np.uint16 if form.split(".")[-2] in ("bf16", "f16") else np.uint32
    operands = "%a, %a" if "x2" in form else "%a"
    with pytest.raises(UnmodelledInstruction):
        evaluate(f"cvt.{form} %x, {operands};", a, outputs=(size,))
