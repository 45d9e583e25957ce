"""setp, set and testp against their definitions."""

from __future__ import annotations

import math
import operator

import numpy as np
import pytest

from cute_flash.emulator import UnmodelledInstruction

from .evaluate import evaluate
from .test_floating import decoded
from .values import float_bits, integers

ORDERED = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt,
           "ge": operator.ge}  # fmt: skip
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def pair(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays of integers that are equal in every fourth place."""
    a, b = integers(kind, 0), integers(kind, 1)
    b[::4] = a[::4]
    return a, b


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64", "b32"])
def test_integers(kind):
    a, b = pair(kind.replace("b", "u"))
    for name, function in ORDERED.items():
        if kind[0] == "b" and name not in ("eq", "ne"):
            continue
        (got,) = evaluate(f"setp.{name}.{kind} %x, %a, %b;", a, b, outputs=(bool,))
        assert got.tolist() == [function(p, q) for p, q in zip(a.tolist(), b.tolist(), strict=True)], name
    for name, same in UNSIGNED.items() if kind[0] == "u" else ():
        (got,) = evaluate(f"setp.{name}.{kind} %x, %a, %b;", a, b, outputs=(bool,))
        (expected,) = evaluate(f"setp.{same}.{kind} %x, %a, %b;", a, b, outputs=(bool,))
        assert (got == expected).all()


def compared(name: str, a: float, b: float) -> bool:
    unordered = math.isnan(a) or math.isnan(b)
    if name in ("num", "nan"):
        return unordered == (name == "nan")
    if name[-1] == "u" and name[:-1] in ORDERED:
        return unordered or ORDERED[name[:-1]](a, b)
    return not unordered and ORDERED[name](a, b)


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("name", [*ORDERED, *(f"{n}u" for n in ORDERED), "num", "nan"])
def test_floats(name, kind):
    a, b = float_bits(kind, 2), float_bits(kind, 3)
    b[::4] = a[::4]
    (got,) = evaluate(f"setp.{name}.{kind} %x, %a, %b;", a, b, outputs=(bool,), target="sm_90")
    expected = [compared(name, p, q) for p, q in zip(decoded(kind, a), decoded(kind, b), strict=True)]
    assert got.tolist() == expected


@pytest.mark.parametrize("join", ["and", "or", "xor"])
def test_combination_and_second_result(join):
    a, b = pair("s32")
    c = np.arange(192) % 2 == 0
    function = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}[join]
    for sign, condition in (("", c), ("!", ~c)):
        code = f"setp.lt.{join}.s32 %x|%y, %a, %b, {sign}%c;"
        first, second = evaluate(code, a, b, c, outputs=(bool, bool))
        assert (first == function(a < b, condition)).all()
        assert (second == function(~(a < b), condition)).all()


def test_flushed_comparison():
    tiny = np.array([1, 0x80000001, 0, 0x00800000], np.uint32)
    zero = np.zeros(4, np.uint32)
    assert evaluate("setp.eq.ftz.f32 %x, %a, %b;", tiny, zero, outputs=(bool,))[0].tolist() == [1, 1, 1, 0]
    assert evaluate("setp.eq.f32 %x, %a, %b;", tiny, zero, outputs=(bool,))[0].tolist() == [0, 0, 1, 0]


def test_set_gives_numbers():
    a, b = pair("s32")
    (got,) = evaluate("set.gt.u32.s32 %x, %a, %b;", a, b, outputs=(np.uint32,))
    assert (got == np.where(a > b, 0xFFFFFFFF, 0)).all()
    (got,) = evaluate("set.gt.f32.s32 %x, %a, %b;", a, b, outputs=(np.float32,))
    assert (got == np.where(a > b, 1.0, 0.0)).all()
    c = np.arange(192) % 3 == 0
    (got,) = evaluate("set.gt.or.s32.s32 %x, %a, %b, %c;", a, b, c, outputs=(np.int32,))
    assert (got == np.where((a > b) | c, -1, 0)).all()


def test_packed_halves():
    a, b = float_bits("f16", 4), float_bits("f16", 5)
    words = [np.ascontiguousarray(v).view(np.uint32) for v in (a, b)]
    first, second = evaluate("setp.le.f16x2 %x|%y, %a, %b;", *words, outputs=(bool, bool))
    with np.errstate(invalid="ignore"):
        expected = (a.view(np.float16) <= b.view(np.float16)).reshape(-1, 2)
    assert (first == expected[:, 0]).all()
    assert (second == expected[:, 1]).all()


@pytest.mark.parametrize("name", ["finite", "infinite", "number", "notanumber", "normal", "subnormal"])
def test_classes(name):
    a = float_bits("f32", 6)
    (got,) = evaluate(f"testp.{name}.f32 %x, %a;", a, outputs=(bool,))
    tests = {
        "finite": math.isfinite,
        "infinite": math.isinf,
        "number": lambda v: not math.isnan(v),
        "notanumber": math.isnan,
        "normal": lambda v: math.isfinite(v) and abs(v) >= 2.0**-126,
        "subnormal": lambda v: 0 < abs(v) < 2.0**-126,
    }
    assert got.tolist() == [tests[name](v) for v in decoded("f32", a)]


@pytest.mark.parametrize("code", ["setp.ltu.s32", "setp.lo.f32", "setp.lt.b32", "setp.num.u32"])
def test_comparisons_that_ptx_does_not_have(code):
    with pytest.raises(UnmodelledInstruction):
        evaluate(f"{code} %x, %a, %a;", np.zeros(4, np.uint32), outputs=(bool,))
