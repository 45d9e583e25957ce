"""Integer arithmetic. Everything wraps modulo 2**n except where .sat says otherwise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..translate.translation import OPERATIONS, Operation, operation
from .apply import elementwise

SIZED = ("u16", "s16", "u32", "s32", "u64", "s64")
PACKED = ("u16x2", "s16x2")
FLOATS = ("f16", "f16x2", "bf16", "bf16x2", "f32", "f32x2", "f64")
WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def is_float(x: Operation) -> bool:
    """Whether an opcode that integers and floats share is the float one: its last type says so."""
    return any(m in FLOATS for m in x.modifiers)


def float_twin(name: str) -> Callable:
    """The operation in floating.py that takes over the float forms of `name`; registered as "name:float"."""
    return OPERATIONS[f"{name}:float"]


def saturated(function: Callable) -> Callable:
    """The s32 form of function that clamps to the type's range; computed in s64."""

    def clamp(*values: np.ndarray) -> np.ndarray:
        exact = function(*(v.astype(np.int64) for v in values))
        return np.clip(exact, -(1 << 31), (1 << 31) - 1).astype(np.int32)

    return clamp


def _sum(name: str, function: Callable) -> None:
    @operation(name)
    def build(x: Operation) -> Callable:
        if is_float(x):
            return float_twin(name)(x)
        saturate = x.flag("sat")
        kind = x.type(*SIZED, *PACKED)
        if saturate and kind != "s32":
            raise x.unmodelled(f".sat with .{kind}")
        return elementwise(x, saturated(function) if saturate else function, kind, kind, kind)

    build.__doc__ = f"{name} d, a, b."


_sum("add", np.add)
_sum("sub", np.subtract)


def high_product(kind: str) -> Callable:
    """The upper half of the exact product of two integers of `kind`."""
    if kind in WIDER:
        wide = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 4}")
        shift = wide.type(int(kind[1:]))
        return lambda a, b: a.astype(wide) * b.astype(wide) >> shift
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)

    def unsigned(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
        middle = a1 * b0 + (a0 * b0 >> half)
        other = a0 * b1 + (middle & low)
        return a1 * b1 + (middle >> half) + (other >> half)

    def signed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        ua, ub = a.astype(np.uint64), b.astype(np.uint64)
        correction = np.where(a < 0, ub, np.uint64(0)) + np.where(b < 0, ua, np.uint64(0))
        return (unsigned(ua, ub) - correction).view(np.int64)

    return unsigned if kind == "u64" else signed


@operation("mul")
def mul(x: Operation) -> Callable:
    """mul.lo, mul.hi and mul.wide."""
    if is_float(x):
        return float_twin("mul")(x)
    part = x.one_of("lo", "hi", "wide")
    kind = x.type(*SIZED)
    if part == "lo":
        return elementwise(x, np.multiply, kind, kind, kind)
    if part == "hi":
        return elementwise(x, high_product(kind), kind, kind, kind)
    if kind not in WIDER:
        raise x.unmodelled(f".wide with .{kind}")
    wide = VIEW_TYPES[WIDER[kind]]
    return elementwise(x, lambda a, b: a.astype(wide) * b.astype(wide), WIDER[kind], kind, kind)


VIEW_TYPES = {"u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64}


@operation("mad")
def mad(x: Operation) -> Callable:
    """mad.lo, mad.hi{.sat} and mad.wide: a * b + c."""
    if is_float(x):
        return float_twin("fma")(x)
    part = x.one_of("lo", "hi", "wide")
    saturate = x.flag("sat")
    kind = x.type(*SIZED)
    if saturate and (part, kind) != ("hi", "s32"):
        raise x.unmodelled(".sat here")
    if part == "lo":
        return elementwise(x, lambda a, b, c: a * b + c, kind, kind, kind, kind)
    if part == "hi":
        high = high_product(kind)
        if saturate:
            total = saturated(np.add)
            return elementwise(x, lambda a, b, c: total(high(a, b), c), kind, kind, kind, kind)
        return elementwise(x, lambda a, b, c: high(a, b).astype(c.dtype) + c, kind, kind, kind, kind)
    if kind not in WIDER:
        raise x.unmodelled(f".wide with .{kind}")
    wide = VIEW_TYPES[WIDER[kind]]
    return elementwise(
        x, lambda a, b, c: a.astype(wide) * b.astype(wide) + c, WIDER[kind], kind, kind, WIDER[kind]
    )


@operation("mul24", "mad24")
def mul24(x: Operation) -> Callable:
    """Products of the low 24 bits: bits 0-31 (lo) or 16-47 (hi) of the 48-bit product."""
    part = x.one_of("lo", "hi")
    kind = x.type("u32", "s32")
    shift, wide = np.int64(0 if part == "lo" else 16), np.int64

    def low24(v: np.ndarray) -> np.ndarray:
        cut = v.astype(np.int64) << wide(40)
        return cut >> wide(40) if kind == "s32" else (cut.view(np.uint64) >> np.uint64(40)).view(np.int64)

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (low24(a) * low24(b) >> shift).astype(a.dtype)

    if x.name == "mul24":
        return elementwise(x, product, kind, kind, kind)
    return elementwise(x, lambda a, b, c: product(a, b) + c, kind, kind, kind, kind)


def _magnitude(v: np.ndarray) -> np.ndarray:
    """|v| as unsigned, right for the most negative number too."""
    unsigned = v.view(np.dtype(f"u{v.dtype.itemsize}"))
    return np.where(v < 0, np.negative(unsigned), unsigned)


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Quotient rounded toward zero. Division by zero gives all ones, as hardware does (PTX: unspecified)."""
    zero = b == 0
    if a.dtype.kind == "u":
        return np.where(zero, ~a.dtype.type(0), a // np.where(zero, a.dtype.type(1), b))
    ua, ub = _magnitude(a), _magnitude(b)
    quotient = ua // np.where(zero, ub.dtype.type(1), ub)
    quotient = np.where((a < 0) ^ (b < 0), np.negative(quotient), quotient).view(a.dtype)
    return np.where(zero, a.dtype.type(-1), quotient)


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a - b * divide(a, b); for b = 0 that is a."""
    return np.where(b == 0, a, a - b * divide(a, b))


@operation("div")
def div(x: Operation) -> Callable:
    """Integer quotient."""
    if is_float(x):
        return float_twin("div")(x)
    kind = x.type(*SIZED)
    return elementwise(
        x, lambda a, b: divide(np.ascontiguousarray(a), np.ascontiguousarray(b)), kind, kind, kind
    )


@operation("rem")
def rem(x: Operation) -> Callable:
    """Integer remainder; it has the dividend's sign."""
    kind = x.type(*SIZED)
    return elementwise(
        x, lambda a, b: remainder(np.ascontiguousarray(a), np.ascontiguousarray(b)), kind, kind, kind
    )


@operation("abs")
def absolute(x: Operation) -> Callable:
    """|a|; the most negative number stays."""
    if is_float(x):
        return float_twin("abs")(x)
    kind = x.type("s16", "s32", "s64")
    return elementwise(x, np.abs, kind, kind)


@operation("neg")
def negate(x: Operation) -> Callable:
    """-a."""
    if is_float(x):
        return float_twin("neg")(x)
    kind = x.type("s16", "s32", "s64")
    return elementwise(x, np.negative, kind, kind)


def _extreme(name: str, function: Callable) -> None:
    @operation(name)
    def build(x: Operation) -> Callable:
        if is_float(x):
            return float_twin(name)(x)
        relu = x.flag("relu")
        kind = x.type(*SIZED, *PACKED)
        if relu:
            if kind not in ("s32", "s16x2"):
                raise x.unmodelled(f".relu with .{kind}")
            return elementwise(x, lambda a, b: np.maximum(function(a, b), 0), kind, kind, kind)
        return elementwise(x, function, kind, kind, kind)

    build.__doc__ = f"{name} d, a, b; .relu clamps negative results to 0."


_extreme("min", np.minimum)
_extreme("max", np.maximum)


@operation("sad")
def sad(x: Operation) -> Callable:
    """c + |a - b|."""
    kind = x.type(*SIZED)
    return elementwise(x, lambda a, b, c: c + (np.maximum(a, b) - np.minimum(a, b)), kind, kind, kind, kind)


def _pieces(v: np.ndarray, kind: str, piece: int) -> np.ndarray:
    """The 8- or 16-bit pieces of u32 values, signed or not as `kind` says, int64 with one more axis."""
    dtype = np.dtype(f"{'i' if kind == 's32' else 'u'}{piece}")
    return v.view(dtype).reshape(*v.shape, 4 // piece).astype(np.int64)


@operation("dp4a")
def dp4a(x: Operation) -> Callable:
    """c plus the dot product of four bytes."""
    kind_a, kind_b = x.type("u32", "s32"), x.type("u32", "s32")

    def dot(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
        return ((_pieces(a, kind_a, 1) * _pieces(b, kind_b, 1)).sum(axis=-1) + c).astype(np.uint32)

    return elementwise(x, dot, "u32", "u32", "u32", "u32")


@operation("dp2a")
def dp2a(x: Operation) -> Callable:
    """c plus the products of a's two halves with the low or high two bytes of b."""
    part = x.one_of("lo", "hi")
    kind_a, kind_b = x.type("u32", "s32"), x.type("u32", "s32")
    chosen = slice(0, 2) if part == "lo" else slice(2, 4)

    def dot(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
        return ((_pieces(a, kind_a, 2) * _pieces(b, kind_b, 1)[..., chosen]).sum(axis=-1) + c).astype(
            np.uint32
        )

    return elementwise(x, dot, "u32", "u32", "u32", "u32")
