"""Integer arithmetic against Python's exact integers."""

from __future__ import annotations

import numpy as np
import pytest

from .evaluate import evaluate
from .values import integers

KINDS = ("u16", "s16", "u32", "s32", "u64", "s64")
WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def dtype(kind: str) -> np.dtype:
    return np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")


def wrap(value: int, kind: str) -> int:
    """Two's complement value of `kind` that is congruent to `value`."""
    bits = int(kind[1:])
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> bits - 1 else value


def clamp(value: int, kind: str) -> int:
    info = np.iinfo(dtype(kind))
    return max(info.min, min(info.max, value))


def quotient(a: int, b: int) -> int:
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def check(code: str, kind: str, function, operands: int, result: str = "", **options: str) -> None:
    """Compare an instruction on `operands` inputs of `kind` (the last of `last`) with function on Python
    integers.
    """
    result, last, target = result or kind, options.get("last"), options.get("target", "sm_80")
    inputs = [integers(last if last and k == operands - 1 else kind, k) for k in range(operands)]
    (got,) = evaluate(code, *inputs, outputs=(dtype(result),), target=target)
    for k, values in enumerate(zip(*(v.tolist() for v in inputs), strict=True)):
        assert got[k] == wrap(function(*values), result), (values, int(got[k]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("add", lambda a, b: a + b),
        ("sub", lambda a, b: a - b),
        ("mul.lo", lambda a, b: a * b),
        ("min", min),
        ("max", max),
        ("div", quotient),
        ("rem", lambda a, b: a if b == 0 else a - b * quotient(a, b)),
    ],
)
def test_two_operands(opcode, function, kind):
    check(f"{opcode}.{kind} %x, %a, %b;", kind, function, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_high_product(kind):
    bits = int(kind[1:])
    check(f"mul.hi.{kind} %x, %a, %b;", kind, lambda a, b: a * b >> bits, 2)
    check(f"mad.hi.{kind} %x, %a, %b, %c;", kind, lambda a, b, c: (a * b >> bits) + c, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_multiply_and_add(kind):
    check(f"mad.lo.{kind} %x, %a, %b, %c;", kind, lambda a, b, c: a * b + c, 3)
    check(f"sad.{kind} %x, %a, %b, %c;", kind, lambda a, b, c: c + abs(a - b), 3)


@pytest.mark.parametrize("kind", WIDER)
def test_wide(kind):
    wide = WIDER[kind]
    check(f"mul.wide.{kind} %x, %a, %b;", kind, lambda a, b: a * b, 2, wide)
    check(f"mad.wide.{kind} %x, %a, %b, %c;", kind, lambda a, b, c: a * b + c, 3, wide, last=wide)


def test_saturation():
    check("add.sat.s32 %x, %a, %b;", "s32", lambda a, b: clamp(a + b, "s32"), 2)
    check("sub.sat.s32 %x, %a, %b;", "s32", lambda a, b: clamp(a - b, "s32"), 2)
    check("mad.hi.sat.s32 %x, %a, %b, %c;", "s32", lambda a, b, c: clamp((a * b >> 32) + c, "s32"), 3)


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_sign(kind):
    check(f"abs.{kind} %x, %a;", kind, abs, 1)
    check(f"neg.{kind} %x, %a;", kind, lambda a: -a, 1)


def test_relu():
    check("max.relu.s32 %x, %a, %b;", "s32", lambda a, b: max(a, b, 0), 2, target="sm_90")
    check("min.relu.s32 %x, %a, %b;", "s32", lambda a, b: max(min(a, b), 0), 2, target="sm_90")


@pytest.mark.parametrize("kind", ["u32", "s32"])
@pytest.mark.parametrize("part", ["lo", "hi"])
def test_24_bits(kind, part):
    low = lambda v: wrap(v << 8, kind) >> 8  # noqa: E731
    shift = 16 if part == "hi" else 0
    check(f"mul24.{part}.{kind} %x, %a, %b;", kind, lambda a, b: low(a) * low(b) >> shift, 2)
    check(f"mad24.{part}.{kind} %x, %a, %b, %c;", kind, lambda a, b, c: (low(a) * low(b) >> shift) + c, 3)


def halves(value: int, kind: str) -> list[int]:
    return [wrap(value >> shift, f"{kind[0]}16") for shift in (0, 16)]


@pytest.mark.parametrize("kind", ["u16x2", "s16x2"])
@pytest.mark.parametrize(("opcode", "function"), [("add", int.__add__), ("min", min), ("max", max)])
def test_packed(opcode, function, kind):
    def both(a: int, b: int) -> int:
        results = [function(p, q) & 0xFFFF for p, q in zip(halves(a, kind), halves(b, kind), strict=True)]
        return results[0] | results[1] << 16

    check(f"{opcode}.{kind} %x, %a, %b;", "u32", both, 2, target="sm_90")


@pytest.mark.parametrize("a_kind", ["u32", "s32"])
@pytest.mark.parametrize("b_kind", ["u32", "s32"])
def test_dot_products(a_kind, b_kind):
    def pieces(value: int, kind: str, bits: int) -> list[int]:
        return [wrap(value >> k, f"{kind[0]}{bits}") for k in range(0, 32, bits)]

    def four(a: int, b: int, c: int) -> int:
        return c + sum(p * q for p, q in zip(pieces(a, a_kind, 8), pieces(b, b_kind, 8), strict=True))

    check(f"dp4a.{a_kind}.{b_kind} %x, %a, %b, %c;", "u32", four, 3)
    for part, first in (("lo", 0), ("hi", 2)):

        def two(a: int, b: int, c: int, first: int = first) -> int:
            chosen = pieces(b, b_kind, 8)[first : first + 2]
            return c + sum(p * q for p, q in zip(pieces(a, a_kind, 16), chosen, strict=True))

        check(f"dp2a.{part}.{a_kind}.{b_kind} %x, %a, %b, %c;", "u32", two, 3)
