"""Bit operations, moves and selections against their definitions on Python integers."""

from __future__ import annotations

import numpy as np
import pytest

from .evaluate import evaluate
from .values import integers

UNSIGNED = {"b16": "u16", "b32": "u32", "b64": "u64"}


def mask(bits: int) -> int:
    return (1 << bits) - 1


def signed(value: int, bits: int) -> int:
    value &= mask(bits)
    return value - (1 << bits) if value >> bits - 1 else value


def check(code: str, inputs: list[np.ndarray], function, result: str = "u32") -> None:
    dtype = np.dtype(f"u{int(result[1:]) // 8}")
    (got,) = evaluate(code, *inputs, outputs=(dtype,))
    for k, values in enumerate(zip(*(v.tolist() for v in inputs), strict=True)):
        expected = int(function(*values)) & mask(8 * dtype.itemsize)
        assert got[k] == expected, (values, hex(got[k]), hex(expected))


@pytest.mark.parametrize("kind", UNSIGNED)
@pytest.mark.parametrize(
    ("name", "function"), [("and", int.__and__), ("or", int.__or__), ("xor", int.__xor__)]
)
def test_logic(name, function, kind):
    view = UNSIGNED[kind]
    check(f"{name}.{kind} %x, %a, %b;", [integers(view, 0), integers(view, 1)], function, view)


@pytest.mark.parametrize("kind", UNSIGNED)
def test_not(kind):
    view = UNSIGNED[kind]
    check(f"not.{kind} %x, %a;", [integers(view, 0)], lambda a: ~a, view)
    check(f"cnot.{kind} %x, %a;", [integers(view, 0)], lambda a: a == 0, view)


def test_predicate_logic():
    a, b = (np.arange(64) >> k & 1 == 1 for k in (0, 1))
    for name, function in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        (got,) = evaluate(f"{name}.pred %x, %a, %b;", a, b, outputs=(bool,))
        assert (got == function(a, b)).all()
    (got,) = evaluate("not.pred %x, %a;", a, outputs=(bool,))
    assert (got == ~a).all()


AMOUNTS = np.array([0, 1, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 1 << 31, mask(32)], np.uint32)


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64"])
def test_shifts(kind):
    bits = int(kind[1:])
    view = f"{'s' if kind[0] == 's' else 'u'}{bits}"
    inputs = [integers(view, 3), np.resize(AMOUNTS, 192)]
    check(f"shr.{kind} %x, %a, %b;", inputs, lambda a, n: a >> min(n, 2 * bits), view)
    if kind[0] == "b":
        check(f"shl.{kind} %x, %a, %b;", inputs, lambda a, n: a << n if n < bits else 0, view)


@pytest.mark.parametrize("amount", [0, 5, 31, 32, 40])
def test_shift_by_literal(amount):
    a = [integers("s32", 4)]
    check(f"shr.s32 %x, %a, {amount};", a, lambda v: v >> amount)
    check(f"shl.b32 %x, %a, {amount};", a, lambda v: v << amount)


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_funnel_shift(mode):
    inputs = [integers("u32", 5), integers("u32", 6), np.resize(AMOUNTS, 192)]
    amount = (lambda n: min(n, 32)) if mode == "clamp" else (lambda n: n & 31)
    check(f"shf.l.{mode}.b32 %x, %a, %b, %c;", inputs, lambda a, b, n: (b << 32 | a) << amount(n) >> 32)
    check(f"shf.r.{mode}.b32 %x, %a, %b, %c;", inputs, lambda a, b, n: (b << 32 | a) >> amount(n))


@pytest.mark.parametrize("table", [0x00, 0xC0, 0x96, 0xE8, 0xFE, 0x3A, 0xFF])
def test_lop3(table):
    def combine(a: int, b: int, c: int) -> int:
        bit = lambda k: table >> ((a >> k & 1) << 2 | (b >> k & 1) << 1 | (c >> k & 1)) & 1  # noqa: E731
        return sum(bit(k) << k for k in range(32))

    check(f"lop3.b32 %x, %a, %b, %c, {table:#x};", [integers("u32", k) for k in range(3)], combine)


def test_prmt():
    def permute(a: int, b: int, selector: int) -> int:
        bytes_ = [(b << 32 | a) >> 8 * k & 0xFF for k in range(8)]
        result = 0
        for k in range(4):
            nibble = selector >> 4 * k & 15
            byte = bytes_[nibble & 7]
            result |= ((0xFF if byte >> 7 else 0) if nibble & 8 else byte) << 8 * k
        return result

    inputs = [integers("u32", 0), integers("u32", 1), integers("u32", 2)]
    check("prmt.b32 %x, %a, %b, %c;", inputs, permute)
    check("prmt.b32 %x, %a, %b, 0x3340U;", inputs[:2], lambda a, b: permute(a, b, 0x3340))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_extract_field(kind):
    bits = int(kind[1:])
    random = np.random.default_rng(0)
    position, length = (random.integers(0, 80, 192).astype(np.uint32) for _ in range(2))
    length[:40] = 0

    def extract(a: int, start: int, count: int) -> int:
        start, count = start & 0xFF, count & 0xFF
        top = min(start + count - 1, bits - 1)
        sign = 0 if kind[0] == "u" or count == 0 else (a & mask(bits)) >> top & 1
        return sum(
            ((a & mask(bits)) >> start + i & 1 if i < count and start + i < bits else sign) << i
            for i in range(bits)
        )

    view = f"{kind[0]}{bits}"
    check(f"bfe.{kind} %x, %a, %b, %c;", [integers(view, 7), position, length], extract, view)


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_insert_field(kind):
    bits = int(kind[1:])
    random = np.random.default_rng(1)
    position, length = (random.integers(0, 80, 192).astype(np.uint32) for _ in range(2))

    def insert(a: int, b: int, start: int, count: int) -> int:
        for i in range(min(count, bits - start if start < bits else 0)):
            b = b & ~(1 << start + i) | (a >> i & 1) << start + i
        return b

    view = UNSIGNED[kind]
    inputs = [integers(view, 8), integers(view, 9), position, length]
    check(f"bfi.{kind} %x, %a, %b, %c, %d;", inputs, insert, view)


def test_masks_and_extension():
    random = np.random.default_rng(2)
    position, length = (random.integers(0, 40, 192).astype(np.uint32) for _ in range(2))
    both = [position, length]
    check("bmsk.clamp.b32 %x, %a, %b;", both, lambda a, b: mask(min(b, 32)) << min(a, 32))
    check("bmsk.wrap.b32 %x, %a, %b;", both, lambda a, b: mask(b & 31) << (a & 31))
    value = integers("s32", 10)
    extend = lambda a, n: signed(a & mask(n), n) if n else 0  # noqa: E731
    check("szext.clamp.s32 %x, %a, %b;", [value, length], lambda a, n: extend(a, min(n, 32)))
    check("szext.wrap.u32 %x, %a, %b;", [value, length], lambda a, n: a & mask(n & 31))


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_counting(kind):
    bits, view = int(kind[1:]), UNSIGNED[kind]
    a = [integers(view, 11)]
    check(f"popc.{kind} %x, %a;", a, int.bit_count)
    check(f"clz.{kind} %x, %a;", a, lambda v: bits - v.bit_length())
    check(f"brev.{kind} %x, %a;", a, lambda v: int(f"{v:0{bits}b}"[::-1], 2), view)


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_find_leading(kind):
    bits = int(kind[1:])

    def position(a: int) -> int:
        return (~a if a < 0 else a).bit_length() - 1

    a = [integers(f"{kind[0]}{bits}", 12)]
    check(f"bfind.{kind} %x, %a;", a, position)
    check(f"bfind.shiftamt.{kind} %x, %a;", a, lambda v: bits - 1 - position(v) if position(v) >= 0 else -1)


def test_moves_between_widths():
    a, b = integers("u32", 13), integers("u32", 14)
    check("mov.b64 %x, {%a, %b};", [a, b], lambda p, q: p | q << 32, "u64")
    wide = integers("u64", 15)
    low, high = evaluate("mov.b64 {%x, %y}, %a;", wide, outputs=(np.uint32, np.uint32))
    assert (low == (wide & np.uint64(mask(32)))).all()
    assert (high == wide >> np.uint64(32)).all()
    (high,) = evaluate("mov.b64 {_, %x}, %a;", wide, outputs=(np.uint32,))
    assert (high == wide >> np.uint64(32)).all()
    halves = [integers("u16", k) for k in range(4)]
    check("mov.b32 %x, {%a, %b};", halves[:2], lambda p, q: p | q << 16)
    check("mov.b64 %x, {%a, %b, %c, %d};", halves, lambda p, q, r, s: p | q << 16 | r << 32 | s << 48, "u64")
    parts = evaluate("mov.b64 {%x, %y, %z, %u}, %a;", wide, outputs=(np.uint16,) * 4)
    for k, part in enumerate(parts):
        assert (part == (wide >> np.uint64(16 * k) & np.uint64(mask(16)))).all()


@pytest.mark.parametrize(
    ("code", "dtype", "expected"),
    [
        ("mov.u32 %x, -7;", np.uint32, mask(32) - 6),
        ("mov.b32 %x, 0f3F800000;", np.uint32, 0x3F800000),
        ("mov.f32 %x, 0d3FF8000000000000;", np.float32, 1.5),
        ("mov.f64 %x, 0f3FC00000;", np.float64, 1.5),
        ("mov.u16 %x, 0x1ffff;", np.uint16, 0xFFFF),
        ("mov.u32 %x, WARP_SZ;", np.uint32, 32),
        ("mov.u64 %x, 017;", np.uint64, 15),
        ("mov.b32 %x, 0b101;", np.uint32, 5),
    ],
)
def test_literals(code, dtype, expected):
    (got,) = evaluate(code, np.zeros(4, np.uint32), outputs=(dtype,))
    assert (got == dtype(expected)).all()


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "f32", "f64", "s16", "u64"])
def test_selection(kind):
    view = f"u{kind[1:]}"
    choice = np.arange(192) % 3 == 0
    inputs = [integers(view, 16), integers(view, 17), choice]
    check(f"selp.{kind} %x, %a, %b, %c;", inputs, lambda a, b, c: a if c else b, view)
    check(f"selp.{kind} %x, %a, %b, !%c;", inputs, lambda a, b, c: b if c else a, view)


def test_selection_by_sign():
    sign = integers("s32", 18)
    check("slct.b32.s32 %x, %a, %b, %c;", [integers("u32", 0), integers("u32", 1), sign],
          lambda a, b, c: a if c >= 0 else b)  # fmt: skip
    floats = np.resize(np.array([1.0, -1.0, 0.0, -0.0, np.nan, np.inf], np.float32), 192)
    check("slct.b32.f32 %x, %a, %b, %c;", [integers("u32", 0), integers("u32", 1), floats],
          lambda a, b, c: a if c >= 0 else b)  # fmt: skip
