"""Bit operations, moves and selections."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..ptx.operands import Vector
from ..translate.translation import Operation, operation
from .apply import INTEGER_VIEWS, apply, elementwise

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads

BITS = ("pred", "b16", "b32", "b64")
VIEWS = INTEGER_VIEWS | {"pred": "pred", "f16": "f16", "f16x2": "u32", "f32": "f32", "f64": "f64"}


def _logic(name: str, function: Callable) -> None:
    @operation(name)
    def build(x: Operation) -> Callable:
        view = VIEWS[x.type(*BITS)]
        return elementwise(x, function, view, view, view)

    build.__doc__ = f"{name} d, a, b."


_logic("and", np.bitwise_and)
_logic("or", np.bitwise_or)
_logic("xor", np.bitwise_xor)


@operation("not")
def invert(x: Operation) -> Callable:
    """~a."""
    view = VIEWS[x.type(*BITS)]
    return elementwise(x, np.invert, view, view)


@operation("cnot")
def cnot(x: Operation) -> Callable:
    """1 where a is 0, else 0."""
    view = VIEWS[x.type("b16", "b32", "b64")]
    return elementwise(x, lambda a: a == 0, view, view)


@operation("shl")
def shl(x: Operation) -> Callable:
    """a << b; amounts of the width or more give 0."""
    view = VIEWS[x.type("b16", "b32", "b64")]
    bits = int(view[1:])
    kind = np.dtype(f"u{bits // 8}").type

    def shift(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.where(b < bits, a << np.minimum(b, bits - 1).astype(kind), kind(0))

    return _shift(x, shift, view, bits, np.left_shift)


@operation("shr")
def shr(x: Operation) -> Callable:
    """a >> b, arithmetic for signed types; large amounts fill with zeros or the sign."""
    view = VIEWS[x.type("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64")]
    bits = int(view[1:])
    kind = np.dtype(f"{'i' if view[0] == 's' else 'u'}{bits // 8}").type

    def shift(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        inside = a >> np.minimum(b, bits - 1).astype(kind)
        return inside if view[0] == "s" else np.where(b < bits, inside, kind(0))

    return _shift(x, shift, view, bits, np.right_shift)


def _shift(x: Operation, general: Callable, view: str, bits: int, direct: Callable) -> Callable:
    """A shift whose amount is usually a literal inside the width: then numpy's own shift is right."""
    operand = x.operand(2)
    amount = getattr(operand, "value", None)
    if isinstance(amount, int) and 0 <= amount < bits:
        return elementwise(x, direct, view, view, view)
    return elementwise(x, general, view, view, "u32")


@operation("shf")
def shf(x: Operation) -> Callable:
    """Funnel shift of {b, a}: left gives the upper word, right the lower; .clamp limits the amount to 32,
    .wrap masks it.
    """
    direction, mode = x.one_of("l", "r"), x.one_of("clamp", "wrap")
    x.type("b32")
    word = np.uint64(32)

    def shift(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        n = (np.minimum(c, 32) if mode == "clamp" else c & np.uint32(31)).astype(np.uint64)
        both = b.astype(np.uint64) << word | a
        return (both << n >> word if direction == "l" else both >> n).astype(np.uint32)

    return elementwise(x, shift, "u32", "u32", "u32", "u32")


@operation("lop3")
def lop3(x: Operation) -> Callable:
    """Any function of three bits, given as its truth table. The predicate form is not modelled."""
    x.type("b32")
    table = x.integer(4)

    def combine(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        result = np.zeros_like(a & b & c)
        for k in range(8):
            if table >> k & 1:
                term = (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
                result |= term
        return result

    return elementwise(x, combine, "u32", "u32", "u32", "u32")


@operation("prmt")
def prmt(x: Operation) -> Callable:
    """Pick four of the eight bytes of {b, a}; selector bit 3 replicates the byte's sign."""
    x.type("b32")
    mode = x.one_of("f4e", "b4e", "rc8", "ecl", "ecr", "rc16", default="")
    if mode:
        raise x.unmodelled(f".{mode}")
    byte = np.uint64(8)

    def permute(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        both = b.astype(np.uint64) << np.uint64(32) | a
        result = np.zeros(both.shape, np.uint64)
        for k in range(4):
            pick = (c >> np.uint32(4 * k) & np.uint32(15)).astype(np.uint64)
            value = both >> (pick & np.uint64(7)) * byte & np.uint64(0xFF)
            sign = np.where(value >> np.uint64(7) != 0, np.uint64(0xFF), np.uint64(0))
            result |= np.where(pick & np.uint64(8) != 0, sign, value) << np.uint64(8 * k)
        return result.astype(np.uint32)

    return elementwise(x, permute, "u32", "u32", "u32", "u32")


@operation("bfe")
def bfe(x: Operation) -> Callable:
    """Extract c bits from position b; signed forms extend the field's (or the word's) top bit."""
    view = VIEWS[x.type("u32", "s32", "u64", "s64")]
    bits = int(view[1:])
    wide = np.dtype(f"u{bits // 8}").type

    def extract(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        a = np.ascontiguousarray(a).view(f"u{bits // 8}")
        position, length = (np.minimum(v & np.uint32(0xFF), bits).astype(np.int64) for v in (b, c))
        inside = np.minimum(length, bits - position)  # bits of the field that lie in the word
        mask = np.where(
            inside < bits, (wide(1) << np.minimum(inside, bits - 1).astype(wide)) - wide(1), ~wide(0)
        )
        field = a >> np.minimum(position, bits - 1).astype(wide) & mask
        if view[0] == "s":
            top = np.clip(position + length - 1, 0, bits - 1).astype(wide)
            sign = (a >> top & wide(1) != 0) & (length > 0)
            field = np.where(sign, field | ~mask, field)
        return field.view(f"{'i' if view[0] == 's' else 'u'}{bits // 8}")

    return elementwise(x, extract, view, view, "u32", "u32")


@operation("bfi")
def bfi(x: Operation) -> Callable:
    """Insert the low d bits of a into b at position c."""
    view = VIEWS[x.type("b32", "b64")]
    bits = int(view[1:])
    wide = np.dtype(f"u{bits // 8}").type
    f, a, b, c, d = (
        x.dest(0, view),
        x.source(1, view),
        x.source(2, view),
        x.source(3, "u32"),
        x.source(4, "u32"),
    )

    def step(m: Machine, g: Threads) -> None:
        at, rows = g.index, m.rows
        position, length = (np.minimum(rows["u32"][r][at] & np.uint32(0xFF), bits) for r in (c, d))
        mask = np.where(
            length < bits, (wide(1) << np.minimum(length, bits - 1).astype(wide)) - wide(1), ~wide(0)
        )
        shift = np.minimum(position, bits - 1).astype(wide)
        mask = np.where(position < bits, mask << shift, wide(0))
        rows[view][f][at] = rows[view][b][at] & ~mask | rows[view][a][at] << shift & mask

    return step


@operation("bmsk")
def bmsk(x: Operation) -> Callable:
    """A mask of b ones from position a."""
    mode = x.one_of("clamp", "wrap")
    x.type("b32")

    def mask(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if mode == "clamp":
            position, length = np.minimum(a, 32).astype(np.uint64), np.minimum(b, 32).astype(np.uint64)
        else:
            position, length = (a & np.uint32(31)).astype(np.uint64), (b & np.uint32(31)).astype(np.uint64)
        return (((np.uint64(1) << length) - np.uint64(1)) << position).astype(np.uint32)

    return elementwise(x, mask, "u32", "u32", "u32")


@operation("szext")
def szext(x: Operation) -> Callable:
    """Extend the low b bits of a by zeros or by their top bit."""
    mode, kind = x.one_of("clamp", "wrap"), x.type("u32", "s32")

    def extend(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        n = (np.minimum(b, 32) if mode == "clamp" else b & np.uint32(31)).astype(np.int64)
        low = a.astype(np.int64) & ((1 << n) - 1)
        if kind == "s32":
            low = np.where((n > 0) & (low >> np.maximum(n - 1, 0) & 1 != 0), low - (1 << n), low)
        return low.astype(np.int32 if kind == "s32" else np.uint32)

    return elementwise(x, extend, kind, kind, "u32")


@operation("brev")
def brev(x: Operation) -> Callable:
    """Bits in reverse order."""
    view = VIEWS[x.type("b32", "b64")]
    bits = int(view[1:])
    kind = np.dtype(f"u{bits // 8}").type

    def reverse(a: np.ndarray) -> np.ndarray:
        result, span = a, bits // 2
        keep = (1 << bits) - 1
        while span:
            low = keep // ((1 << span) + 1)
            result = (result >> kind(span) & kind(low)) | (result & kind(low)) << kind(span)
            span //= 2
        return result

    return elementwise(x, reverse, view, view)


def popcount(a: np.ndarray) -> np.ndarray:
    """Number of ones, uint32."""
    return np.bitwise_count(a).astype(np.uint32)


def leading_zeros(a: np.ndarray) -> np.ndarray:
    """Number of zeros above the highest one (the width for 0), uint32; a is unsigned."""
    bits = 8 * a.dtype.itemsize
    smeared, span = a, 1
    while span < bits:
        smeared = smeared | smeared >> a.dtype.type(span)
        span *= 2
    return np.uint32(bits) - popcount(smeared)


@operation("popc")
def popc(x: Operation) -> Callable:
    """Number of ones."""
    return elementwise(x, popcount, "u32", VIEWS[x.type("b32", "b64")])


@operation("clz")
def clz(x: Operation) -> Callable:
    """Number of leading zeros."""
    return elementwise(x, leading_zeros, "u32", VIEWS[x.type("b32", "b64")])


@operation("bfind")
def bfind(x: Operation) -> Callable:
    """Position of the highest one (for negative signed values: of the highest zero), or all ones; .shiftamt
    counts from above.
    """
    shift = x.flag("shiftamt")
    view = VIEWS[x.type("u32", "s32", "u64", "s64")]
    bits = int(view[1:])

    def find(a: np.ndarray) -> np.ndarray:
        if view[0] == "s":
            a = np.where(a < 0, ~a, a)
        zeros = leading_zeros(np.ascontiguousarray(a).view(f"u{bits // 8}"))
        position = zeros if shift else np.uint32(bits - 1) - zeros
        return np.where(zeros == bits, np.uint32(0xFFFFFFFF), position)

    return elementwise(x, find, "u32", view)


@operation("mov")
def mov(x: Operation) -> Callable:
    """Move a value, pack {a, b} into a wider register, or unpack a register into {a, b}."""
    view = VIEWS[x.type(*VIEWS)]
    target, value = x.operand(0), x.operand(1)
    if isinstance(target, Vector):
        return _unpack(x, target.items, value, f"u{view[1:]}")
    if isinstance(value, Vector):
        return _pack(x, target, value.items, f"u{view[1:]}")
    d, a = x.dest(0, view), x.source(1, view)
    x.only_moves()

    def step(m: Machine, g: Threads) -> None:
        rows = m.rows[view]
        rows[d][g.index] = rows[a][g.index]

    return step


def _piece_view(x: Operation, view: str, pieces: int) -> str:
    bits = int(view[1:]) // pieces
    if bits * pieces != int(view[1:]) or bits not in (8, 16, 32):
        raise x.unmodelled(f"{pieces} pieces of .b{view[1:]}")
    return f"u{bits}"


def _unpack(x: Operation, items: tuple, value: object, view: str) -> Callable:
    piece = _piece_view(x, view, len(items))
    a = x.source_of(value, view)
    x.only_moves()
    dests = [x.dest_of(item, piece) for item in items]
    bits, kind = int(piece[1:]), np.dtype(f"u{int(piece[1:]) // 8}")

    def step(m: Machine, g: Threads) -> None:
        value = m.rows[view][a][g.index]
        for k, d in enumerate(dests):
            m.rows[piece][d][g.index] = (value >> value.dtype.type(bits * k)).astype(kind)

    return step


def _pack(x: Operation, target: object, items: tuple, view: str) -> Callable:
    piece = _piece_view(x, view, len(items))
    d = x.dest_of(target, view)
    sources = [x.source_of(item, piece) for item in items]
    x.only_moves()
    bits, kind = int(piece[1:]), np.dtype(f"u{int(view[1:]) // 8}")

    def step(m: Machine, g: Threads) -> None:
        pieces = m.rows[piece]
        value = pieces[sources[0]][g.index].astype(kind)
        for k, a in enumerate(sources[1:], 1):
            value = value | pieces[a][g.index].astype(kind) << kind.type(bits * k)
        m.rows[view][d][g.index] = value

    return step


@operation("selp")
def selp(x: Operation) -> Callable:
    """p ? a : b."""
    view = VIEWS[x.type(*VIEWS)]
    d, a, b = x.dest(0, view), x.source(1, view), x.source(2, view)
    x.only_moves()
    p, negated = x.predicate(3)
    if negated:
        a, b = b, a
    return apply(np.where, (d, view), (p, "pred"), (a, view), (b, view))


@operation("slct")
def slct(x: Operation) -> Callable:
    """c >= 0 ? a : b; a NaN c selects b, -0 counts as 0."""
    x.without_effect("ftz")
    view = VIEWS[x.type(*(v for v in VIEWS if v != "pred"))]
    condition = x.type("s32", "f32")
    return elementwise(x, lambda a, b, c: np.where(c >= 0, a, b), view, view, view, condition)
