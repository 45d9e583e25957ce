"""Floating-point arithmetic against exact fractions rounded once, special values included."""

from __future__ import annotations

import math

import numpy as np
import pytest

from .definitions import FORMATS, NAN, decode, encode, flushed, fused
from .evaluate import evaluate
from .values import float_bits

MODES = ("rn", "rz", "rm", "rp")


def run(code: str, kind: str, *inputs: np.ndarray, result: str = "", target: str = "sm_80") -> list[int]:
    (got,) = evaluate(
        code, *inputs, outputs=(np.dtype(f"u{FORMATS[result or kind].bits // 8}"),), target=target
    )
    return got.tolist()


def same(got: int, expected: int, kind: str) -> bool:
    """Equal patterns, or both NaN: payloads are not modelled."""
    form = FORMATS[kind]
    return got == expected or (math.isnan(decode(got, form)) and math.isnan(decode(expected, form)))


def check(got: list[int], expected: list[int], kind: str, *inputs: np.ndarray) -> None:
    for k, pair in enumerate(zip(got, expected, strict=True)):
        assert same(*pair, kind), ([hex(v[k]) for v in inputs], *map(hex, pair))


def decoded(kind: str, values: np.ndarray) -> list[float]:
    return [decode(v, FORMATS[kind]) for v in values.tolist()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
def test_f32_arithmetic(name, mode):
    form = FORMATS["f32"]
    a, b, c = (float_bits("f32", k, 1024) for k in range(3))
    values = list(zip(*(decoded("f32", v) for v in (a, b, c)), strict=True))
    operands = {
        "add": lambda p, q, r: (p, 1.0, q),
        "sub": lambda p, q, r: (p, 1.0, -q),
        "mul": lambda p, q, r: (p, q, math.copysign(0.0, math.copysign(1, p) * math.copysign(1, q))),
        "fma": lambda p, q, r: (p, q, r),
    }[name]
    expected = [fused(*operands(*v), form, mode) for v in values]
    third = ", %c" if name == "fma" else ""
    check(run(f"{name}.{mode}.f32 %x, %a, %b{third};", "f32", a, b, c), expected, "f32", a, b, c)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
def test_plain_and_flushing_f32(name):
    form = FORMATS["f32"]
    a, b, c = (float_bits("f32", k, 1024) for k in range(3, 6))
    third = ", %c" if name == "fma" else ""
    rounding = ".rn" if name == "fma" else ""
    plain = run(f"{name}{rounding}.f32 %x, %a, %b{third};", "f32", a, b, c)
    check(plain, run(f"{name}.rn.f32 %x, %a, %b{third};", "f32", a, b, c), "f32", a, b, c)
    small = [np.array([flushed(v, form) for v in w.tolist()], np.uint32) for w in (a, b, c)]
    exact = run(f"{name}.rn.f32 %x, %a, %b{third};", "f32", *small)
    got = run(f"{name}.rn.ftz.f32 %x, %a, %b{third};", "f32", a, b, c)
    check(got, [flushed(v, form) for v in exact], "f32", a, b, c)
    clamped = run(f"{name}.rn.sat.f32 %x, %a, %b{third};", "f32", a, b, c)
    limited = [0.0 if math.isnan(v) else min(max(v, 0.0), 1.0) for v in decoded("f32", np.array(plain))]
    check(clamped, [encode(v + 0.0, form) for v in limited], "f32", a, b, c)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
def test_half_arithmetic(name, kind):
    form = FORMATS[kind]
    a, b, c = (float_bits(kind, k, 512) for k in range(6, 9))
    values = list(zip(*(decoded(kind, v) for v in (a, b, c)), strict=True))
    zero = lambda p, q: math.copysign(0.0, math.copysign(1, p) * math.copysign(1, q))  # noqa: E731
    operands = {
        "add": lambda p, q, r: (p, 1.0, q),
        "sub": lambda p, q, r: (p, 1.0, -q),
        "mul": lambda p, q, r: (p, q, zero(p, q)),
        "fma": lambda p, q, r: (p, q, r),
    }[name]
    expected = [fused(*operands(*v), form) for v in values]
    third = ", %c" if name == "fma" else ""
    got = run(f"{name}.rn.{kind} %x, %a, %b{third};", kind, a, b, c, target="sm_90")
    check(got, expected, kind, a, b, c)
    packed = [np.ascontiguousarray(v).view(np.uint32) for v in (a, b, c)]
    (pairs,) = evaluate(
        f"{name}.rn.{kind}x2 %x, %a, %b{third};", *packed, outputs=(np.uint32,), target="sm_90"
    )
    check(pairs.view(np.uint16).tolist(), expected, kind, a, b, c)


@pytest.mark.parametrize("mode", MODES)
def test_f32x2_is_two_f32(mode):
    a, b, c = (float_bits("f32", k, 512) for k in range(9, 12))
    for name, third in (("add", ""), ("mul", ""), ("fma", ", %c")):
        one = run(f"{name}.{mode}.f32 %x, %a, %b{third};", "f32", a, b, c)
        wide = [v.view(np.uint64) for v in (a, b, c)]
        code = f"{name}.{mode}.f32x2 %x, %a, %b{third};"
        (two,) = evaluate(code, *wide, outputs=(np.uint64,), target="sm_100a")
        check(two.view(np.uint32).tolist(), one, "f32", a, b, c)


@pytest.mark.parametrize("small", ["f16", "bf16"])
def test_mixed_operands(small):
    form = FORMATS["f32"]
    a, b = float_bits(small, 12), float_bits(small, 13)
    c = float_bits("f32", 14)
    p, q, r = decoded(small, a), decoded(small, b), decoded("f32", c)
    got = run(f"fma.rn.f32.{small} %x, %a, %b, %c;", "f32", a, b, c, target="sm_100a")
    check(got, [fused(*v, form) for v in zip(p, q, r, strict=True)], "f32", a, b, c)
    got = run(f"add.rz.f32.{small} %x, %a, %b;", "f32", a, c, target="sm_100a")
    check(got, [fused(v, 1.0, w, form, "rz") for v, w in zip(p, r, strict=True)], "f32", a, c)


def test_f64_arithmetic():
    form = FORMATS["f64"]
    a, b, c = (float_bits("f64", k) for k in range(15, 18))
    p, q, r = (decoded("f64", v) for v in (a, b, c))
    for name, third, expected in (
        ("add.f64", "", [fused(v, 1.0, w, form) for v, w in zip(p, q, strict=True)]),
        ("fma.rn.f64", ", %c", [fused(*v, form) for v in zip(p, q, r, strict=True)]),
    ):
        check(run(f"{name} %x, %a, %b{third};", "f64", a, b, c), expected, "f64", a, b, c)


def quotient(a: float, b: float) -> object:
    """a / b as a fraction, or IEEE's special result."""
    from fractions import Fraction

    if math.isnan(a) or math.isnan(b) or (a == 0 and b == 0) or (math.isinf(a) and math.isinf(b)):
        return math.nan
    sign = math.copysign(1, a) * math.copysign(1, b)
    if math.isinf(a) or b == 0:
        return sign * math.inf
    if math.isinf(b) or a == 0:
        return sign * 0.0
    return Fraction(a) / Fraction(b)


@pytest.mark.parametrize("mode", MODES)
def test_division(mode):
    a, b = float_bits("f32", 18, 1024), float_bits("f32", 19, 1024)
    pairs = list(zip(decoded("f32", a), decoded("f32", b), strict=True))
    expected = [encode(quotient(*v), FORMATS["f32"], mode) for v in pairs]
    check(run(f"div.{mode}.f32 %x, %a, %b;", "f32", a, b), expected, "f32", a, b)
    if mode == "rn":
        check(run("div.full.f32 %x, %a, %b;", "f32", a, b), expected, "f32", a, b)
        check(run("div.approx.f32 %x, %a, %b;", "f32", a, b), expected, "f32", a, b)


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
def test_signs(kind):
    form = FORMATS[kind]
    a, top = float_bits(kind, 20), 1 << form.bits - 1
    assert run(f"neg.{kind} %x, %a;", kind, a) == [v ^ top for v in a.tolist()]
    assert run(f"abs.{kind} %x, %a;", kind, a) == [v & ~top for v in a.tolist()]
    if kind in ("f32", "f64"):
        b = float_bits(kind, 21)
        expected = [p & top | q & ~top for p, q in zip(a.tolist(), b.tolist(), strict=True)]
        assert run(f"copysign.{kind} %x, %a, %b;", kind, a, b) == expected


def larger(a: int, b: int, form, sign: int) -> int:
    """max (sign 1) or min (-1) of two patterns: numbers before NaN, -0 below +0."""
    p, q = decode(a, form), decode(b, form)
    if math.isnan(p) or math.isnan(q):
        return NAN[form.bits] if math.isnan(p) and math.isnan(q) else (b if math.isnan(p) else a)
    key = lambda v, bits: (sign * v, -sign * (bits >> form.bits - 1))  # noqa: E731
    return a if key(p, a) >= key(q, b) else b


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize(("name", "sign"), [("max", 1), ("min", -1)])
def test_extremes(name, sign, kind):
    form = FORMATS[kind]
    a, b = float_bits(kind, 22), float_bits(kind, 23)
    b[:24] = a[:24] ^ (np.array(1 << form.bits - 1, a.dtype))
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    expected = [larger(p, q, form, sign) for p, q in pairs]
    assert run(f"{name}.{kind} %x, %a, %b;", kind, a, b) == expected
    if kind == "f64":
        return
    nan = [any(math.isnan(decode(v, form)) for v in pair) for pair in pairs]
    expected = [NAN[form.bits] if n else v for n, v in zip(nan, expected, strict=True)]
    assert run(f"{name}.NaN.{kind} %x, %a, %b;", kind, a, b) == expected


def test_extreme_of_three_and_xorsign():
    form = FORMATS["f32"]
    a, b, c = (float_bits("f32", k) for k in range(24, 27))
    triples = list(zip(a.tolist(), b.tolist(), c.tolist(), strict=True))
    expected = [larger(larger(p, q, form, 1), r, form, 1) for p, q, r in triples]
    assert run("max.f32 %x, %a, %b, %c;", "f32", a, b, c, target="sm_100a") == expected
    top = 1 << 31
    expected = [larger(p & ~top, q & ~top, form, -1) & ~top | (p ^ q) & top for p, q, _ in triples]
    got = run("min.xorsign.abs.f32 %x, %a, %b;", "f32", a, b, target="sm_90")
    check(got, expected, "f32", a, b)


FUNCTIONS = {
    "ex2": lambda v: math.inf if v > 1000 else 2.0**v,
    "lg2": lambda v: math.nan if v < 0 else -math.inf if v == 0 else math.log2(v),
    "rcp": lambda v: math.copysign(math.inf, v) if v == 0 else 1 / v,
    "sqrt": lambda v: v if v == 0 else math.nan if v < 0 else math.sqrt(v),
    "rsqrt": lambda v: math.copysign(math.inf, v) if v == 0 else math.nan if v < 0 else 1 / math.sqrt(v),
    "sin": lambda v: math.nan if math.isinf(v) else math.sin(v),
    "cos": lambda v: math.nan if math.isinf(v) else math.cos(v),
    "tanh": math.tanh,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    """Within one unit in the last place of the exact value, which is inside PTX's bounds."""
    a = float_bits("f32", 27, 1024)
    for ftz in ("", ".ftz") if name != "tanh" else ("",):
        got = decoded("f32", np.array(run(f"{name}.approx{ftz}.f32 %x, %a;", "f32", a)))
        for bits, value in zip(a.tolist(), got, strict=True):
            argument = decode(flushed(bits, FORMATS["f32"]) if ftz else bits, FORMATS["f32"])
            exact = argument if math.isnan(argument) else FUNCTIONS[name](argument)
            unit = 2.0**-149 if abs(exact) < 2.0**-126 else abs(exact) * 2.0**-23
            if ftz and abs(exact) < 2.0**-126:
                assert value == 0, (hex(bits), value)
            elif math.isnan(exact) or math.isinf(exact) or abs(exact) > 3.4028235e38:
                assert math.isnan(value) == math.isnan(exact) and not math.isfinite(value), (hex(bits), value)
            else:
                assert abs(value - exact) <= unit, (hex(bits), value, exact)


def test_exact_functions():
    form = FORMATS["f32"]
    a = float_bits("f32", 28)
    values = decoded("f32", a)
    expected = [encode(v if math.isnan(v) else quotient(1.0, v), form) for v in values]
    check(run("rcp.rn.f32 %x, %a;", "f32", a), expected, "f32", a)
    (root,) = evaluate("sqrt.rn.f32 %x, %a;", a, outputs=(np.float32,))
    with np.errstate(invalid="ignore"):
        assert np.array_equal(root, np.sqrt(a.view(np.float32)), equal_nan=True)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_functions(kind):
    """ex2 of bf16 flushes its result; an input that is subnormal gives 1 either way."""
    form = FORMATS[kind]
    a = float_bits(kind, 29, 1024)
    small = np.linspace(-25, -13, 64) if kind == "f16" else np.linspace(-135, -124, 64)
    a[-64:] = [encode(float(v), form) for v in small]
    for name, modifiers in (("ex2", ".ftz" if kind == "bf16" else ""), ("tanh", "")):
        values = decoded(kind, a)
        expected = [encode(v if math.isnan(v) else FUNCTIONS[name](v), form) for v in values]
        expected = [flushed(v, form) for v in expected] if modifiers else expected
        got = run(f"{name}.approx{modifiers}.{kind} %x, %a;", kind, a, target="sm_90")
        check(got, expected, kind, a)
        code = f"{name}.approx{modifiers}.{kind}x2 %x, %a;"
        (pairs,) = evaluate(code, a.view(np.uint32), outputs=(np.uint32,), target="sm_90")
        check(pairs.view(np.uint16).tolist(), expected, kind, a)
