"""Floating-point arithmetic.

Exact path: operands go to float64, the result is computed there exactly or sticky (see formats.py) and
rounded once in the mode asked for. add, sub, mul of .f32 in round-to-nearest are numpy's own, which are the
same and faster. The payload of a NaN is not modelled except where PTX's definition gives one.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np

from ..base.formats import (
    CANONICAL_NAN,
    bf16_to_f32,
    f32_to_bf16,
    flush,
    round_f32,
    saturate,
    sticky_sum,
    to_odd_f32,
)
from ..translate.translation import Operation, operation
from .apply import elementwise

VIEW = {
    "f16": "f16",
    "f16x2": "f16x2",
    "bf16": "u16",
    "bf16x2": "u16x2",
    "f32": "f32",
    "f32x2": "f32x2",
    "f64": "f64",
}
SCALAR = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}
MODES = ("rn", "rz", "rm", "rp")


def widen(values: np.ndarray, kind: str) -> np.ndarray:
    """Values of a float kind as float64, exact."""
    if kind == "bf16":
        return bf16_to_f32(values).astype(np.float64)
    return values.astype(np.float64)


def narrow(exact: np.ndarray, kind: str, mode: str) -> np.ndarray:
    """float64 (exact or sticky) rounded once to a float kind, as that kind's view holds it."""
    if kind == "f64":
        return exact
    if kind == "f32":
        return round_f32(exact, mode)
    if kind == "f16":
        if mode != "rn":
            raise ValueError(f"f16 with {mode}")
        return exact.astype(np.float16)
    return f32_to_bf16(to_odd_f32(exact), mode)


def _format(x: Operation) -> tuple[str, str]:
    """Consume the type: (PTX type, the scalar format of its elements)."""
    kind = x.type(*VIEW)
    return kind, SCALAR.get(kind, kind)


class Rounding:
    """The rounding, flushing and clamping modifiers of an instruction, in the order PTX applies them."""

    def __init__(self, x: Operation):
        self.mode = x.one_of(*MODES, default="rn")
        self.ftz, self.sat, self.relu = x.flag("ftz"), x.flag("sat"), x.flag("relu")

    @property
    def plain(self) -> bool:
        return self.mode == "rn" and not (self.ftz or self.sat or self.relu)

    def check(self, x: Operation, scalar: str) -> None:
        """Refuse combinations that PTX does not have."""
        if scalar in ("f16", "bf16") and self.mode != "rn":
            raise x.unmodelled(f".{self.mode} with .{scalar}")
        if scalar == "f64" and (self.mode != "rn" or self.ftz or self.sat):
            raise x.unmodelled("rounding modifiers with .f64")
        if self.relu and scalar not in ("f16", "bf16"):
            raise x.unmodelled(f".relu with .{scalar}")

    def inputs(self, values: np.ndarray, scalar: str) -> np.ndarray:
        """An operand as float64, subnormals flushed under .ftz."""
        if self.ftz and scalar == "f32":
            values = flush(values)
        elif self.ftz and scalar == "f16":
            values = flush_f16(values)
        return widen(values, scalar)

    def output(self, exact: np.ndarray, scalar: str) -> np.ndarray:
        """Round and clamp a float64 result."""
        result = narrow(exact, scalar, self.mode)
        if self.ftz and scalar == "f32":
            result = flush(result)
        elif self.ftz and scalar == "f16":
            result = flush_f16(result)
        if self.sat:
            result = _clamp(result, scalar, saturate)
        if self.relu:
            result = _clamp(result, scalar, _relu)
        return result


def flush_f16(values: np.ndarray) -> np.ndarray:
    """float16 with subnormal numbers replaced by zeros of the same sign."""
    return np.where(np.abs(values) < np.float16(2.0**-14), np.copysign(np.float16(0), values), values)


def flush_bf16(bits: np.ndarray) -> np.ndarray:
    """bf16 patterns with subnormal numbers replaced by zeros of the same sign."""
    return np.where(bits & np.uint16(0x7F80), bits, bits & np.uint16(0x8000))


def _relu(values: np.ndarray) -> np.ndarray:
    """Negative numbers become 0; NaN stays."""
    return np.where(np.isnan(values), values, np.maximum(values, values.dtype.type(0)) + values.dtype.type(0))


def _clamp(values: np.ndarray, scalar: str, function: Callable) -> np.ndarray:
    if scalar == "bf16":
        return f32_to_bf16(function(bf16_to_f32(values)))
    return function(values)


def exact_sum(mode: str) -> Callable:
    """a + b of float64 arrays, sticky; the sign of an exact zero follows the rounding mode."""

    def total(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        result = sticky_sum(a, b)
        if mode == "rm":
            return np.where((result == 0) & (np.signbit(a) | np.signbit(b)), -0.0, result)
        return result

    return total


def fma_f64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Correctly rounded a * b + c of float64 arrays, one element at a time: rare and never hot."""
    near = a * b + c
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c) & np.isfinite(near) & (near != 0)
    for k in zip(*np.nonzero(finite), strict=True):
        near[k] = float(Fraction(float(a[k])) * Fraction(float(b[k])) + Fraction(float(c[k])))
    return near


def _arithmetic(name: str, fast: Callable, slow: Callable) -> None:
    """Register the float form of a two-operand instruction. slow(mode)(a, b) works on float64."""

    @operation(f"{name}:float")
    def build(x: Operation) -> Callable:
        rounding = Rounding(x)
        kind, scalar = _format(x)
        if kind == "f32" and x.modifiers and name != "mul":
            return _mixed(x, rounding, slow(rounding.mode))
        rounding.check(x, scalar)
        view, exact = VIEW[kind], slow(rounding.mode)
        if rounding.plain and scalar in ("f32", "f64"):
            return elementwise(x, fast, view, view, view)

        def general(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return rounding.output(exact(rounding.inputs(a, scalar), rounding.inputs(b, scalar)), scalar)

        return elementwise(x, general, view, view, view)

    build.__doc__ = f"{name} d, a, b."


def _mixed(x: Operation, rounding: Rounding, exact: Callable, products: int = 0) -> Callable:
    """The f32 forms whose first operands are 16-bit floats (fma.rn.f32.bf16 d, a, b, c with products = 1)."""
    narrow_kind = x.type("f16", "bf16")
    if rounding.ftz or rounding.relu:
        raise x.unmodelled("a modifier of the mixed form")
    small = [VIEW[narrow_kind]] * (1 + products)

    def compute(*values: np.ndarray) -> np.ndarray:
        wide = [widen(v, narrow_kind) for v in values[:-1]]
        return rounding.output(exact(*wide, widen(values[-1], "f32")), "f32")

    return elementwise(x, compute, "f32", *small, "f32")


_arithmetic("add", np.add, exact_sum)
_arithmetic("sub", np.subtract, lambda mode: lambda a, b: exact_sum(mode)(a, -b))
# Products of two f32 need 48 bits: exact in float64.
_arithmetic("mul", np.multiply, lambda mode: np.multiply)


@operation("fma")
def fma(x: Operation) -> Callable:
    """fma and mad: a * b + c rounded once."""
    rounding = Rounding(x)
    oob = x.flag("oob")
    kind, scalar = _format(x)
    if oob:
        raise x.unmodelled(".oob")
    total = exact_sum(rounding.mode)

    def exact(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return total(a * b, c)

    if kind == "f32" and x.modifiers:
        return _mixed(x, rounding, exact, products=1)
    rounding.check(x, scalar)
    view = VIEW[kind]
    if kind == "f64":
        return elementwise(x, fma_f64, view, view, view, view)
    if scalar == "f32" and rounding.plain:
        return elementwise(x, fma_f32, view, view, view, view)

    def general(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        wide = (rounding.inputs(v, scalar) for v in (a, b, c))
        return rounding.output(exact(*wide), scalar)

    return elementwise(x, general, view, view, view, view)


operation("fma:float")(fma)


def fma_f32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Round-to-nearest f32 fma. One float64 addition suffices unless it lands on a tie or near the
    subnormal range.
    """
    product = a.astype(np.float64) * b
    total = product + c
    doubtful = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    doubtful |= np.abs(total) < 2.0**-125
    if np.count_nonzero(doubtful):
        return sticky_sum(product, c.astype(np.float64)).astype(np.float32)
    return total.astype(np.float32)


@operation("div:float")
def div(x: Operation) -> Callable:
    """Quotient. .approx and .full are rounded to nearest here too: within their documented error."""
    approximate = x.flag("approx") or x.flag("full")
    rounding = Rounding(x)
    kind, scalar = _format(x)
    if kind not in ("f32", "f64"):
        raise x.unmodelled(f".{kind}")
    rounding.check(x, scalar)
    view = VIEW[kind]
    if kind == "f64" or (rounding.plain and not approximate):
        return elementwise(x, np.divide, view, view, view)

    def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        wide_a, wide_b = rounding.inputs(a, "f32"), rounding.inputs(b, "f32")
        if rounding.mode == "rn":
            return rounding.output(wide_a / wide_b, "f32")
        return rounding.output(sticky_quotient(wide_a, wide_b), "f32")

    return elementwise(x, quotient, view, view, view)


def sticky_quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b of f32 values held as float64, with the last bit set where the quotient is not exact."""
    near = a / b
    # near * b needs more than 53 bits, but each half of near times b (24 bits each) does not.
    high = near.astype(np.float32).astype(np.float64)
    residual = (a - high * b) - (near - high) * b
    inexact = (residual != 0) & np.isfinite(residual) & np.isfinite(near)
    even = (near.view(np.int64) & 1) == 0
    away = np.where((residual > 0) == (b > 0), np.inf, -np.inf)
    return np.where(inexact & even, np.nextafter(near, away), near)


@operation("abs:float")
def absolute(x: Operation) -> Callable:
    """|a|."""
    return _sign_operation(x, clear=True)


@operation("neg:float")
def negate(x: Operation) -> Callable:
    """-a."""
    return _sign_operation(x, clear=False)


def _sign_operation(x: Operation, clear: bool) -> Callable:
    ftz = x.flag("ftz")
    kind, scalar = _format(x)
    bits = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}[scalar]
    dtype = np.dtype(f"u{bits // 8}").type
    sign = dtype(1 << bits - 1)
    view = {
        "f16": "u16",
        "bf16": "u16",
        "f16x2": "u16x2",
        "bf16x2": "u16x2",
        "f32": "u32",
        "f32x2": "u32x2",
        "f64": "u64",
    }[kind]

    def change(a: np.ndarray) -> np.ndarray:
        if ftz and scalar == "f32":
            a = flush(np.ascontiguousarray(a).view(np.float32)).view(dtype)
        return a & ~sign if clear else a ^ sign

    if ftz and scalar not in ("f32",):
        raise x.unmodelled(f".ftz with .{kind}")
    return elementwise(x, change, view, view)


@operation("copysign")
def copysign(x: Operation) -> Callable:
    """The magnitude of b with the sign of a."""
    kind = x.type("f32", "f64")
    return elementwise(x, lambda a, b: np.copysign(b, a), kind, kind, kind)


def extreme(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """min or max of float arrays: a number beats NaN, two NaN give the canonical one, and -0 < +0."""
    result = (np.fmax if name == "max" else np.fmin)(a, b)
    special = result == 0
    special |= result != result
    if np.count_nonzero(special):
        unsigned = np.dtype(f"u{result.dtype.itemsize}")
        ua, ub = np.ascontiguousarray(a).view(unsigned), np.ascontiguousarray(b).view(unsigned)
        bits = (ua & ub) if name == "max" else (ua | ub)
        zeros = (a == 0) & (b == 0)
        nan = unsigned.type(CANONICAL_NAN[8 * result.dtype.itemsize])
        patched = np.where(zeros, bits, np.ascontiguousarray(result).view(unsigned))
        result = np.where(result != result, nan, patched).view(result.dtype)
    return result


def _register_extreme(name: str) -> None:
    @operation(f"{name}:float")
    def build(x: Operation) -> Callable:
        ftz, nan, xorsign = x.flag("ftz"), x.flag("NaN"), x.flag("xorsign")
        magnitude = x.flag("abs")
        kind, scalar = _format(x)
        if kind == "f32x2" or (kind == "f64" and (ftz or nan)) or (xorsign and not magnitude):
            raise x.unmodelled("this combination of modifiers")
        view = VIEW[kind]

        def two(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            original = a, b
            if ftz:
                a, b = (flush(v) if scalar == "f32" else flush_f16(v) for v in (a, b))
            if magnitude:
                a, b = np.abs(a), np.abs(b)
            result = extreme(name, a, b)
            if nan:
                result = np.where(np.isnan(a) | np.isnan(b), _nan(result.dtype), result)
            if xorsign:
                flip = np.signbit(original[0]) ^ np.signbit(original[1])
                result = np.where(flip, -np.abs(result), np.abs(result))
            return result

        if scalar == "bf16":
            if ftz:
                raise x.unmodelled(".ftz with .bf16")
            inner = two

            def two(a: np.ndarray, b: np.ndarray) -> np.ndarray:
                return f32_to_bf16(inner(bf16_to_f32(a), bf16_to_f32(b)))

        if x.count() == 4:
            if kind != "f32":
                raise x.unmodelled(f"three inputs with .{kind}")
            return elementwise(x, lambda a, b, c: two(two(a, b), c), view, view, view, view)
        return elementwise(x, two, view, view, view)

    build.__doc__ = f"{name} d, a, b[, c]."


def _nan(dtype: np.dtype) -> np.generic:
    size = dtype.itemsize
    return np.array(CANONICAL_NAN[8 * size], np.dtype(f"u{size}")).view(dtype)[()]


_register_extreme("min")
_register_extreme("max")


def tanh(a: np.ndarray) -> np.ndarray:
    return np.tanh(a)


UNARY: dict[str, Callable] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda a: 1.0 / a,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1.0 / np.sqrt(a),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": tanh,
}
HALF_KINDS = {"ex2": ("f16", "f16x2", "bf16", "bf16x2"), "tanh": ("f16", "f16x2", "bf16", "bf16x2")}


@operation(*UNARY)
def unary(x: Operation) -> Callable:
    """ex2, lg2, rcp, sqrt, rsqrt, sin, cos, tanh.

    The .approx forms are computed in float64 and rounded to nearest: within PTX's error bounds, and more
    exact than hardware.
    """
    function = UNARY[x.name]
    approximate = x.flag("approx")
    rounding = Rounding(x)
    kind = x.type("f32", "f64", *HALF_KINDS.get(x.name, ()))
    scalar = SCALAR.get(kind, kind)
    if rounding.mode != "rn" or rounding.sat or rounding.relu:
        raise x.unmodelled("this rounding")
    if not approximate and x.name not in ("rcp", "sqrt"):
        raise x.unmodelled("the form without .approx")
    if kind == "f64" and (approximate or rounding.ftz):
        raise x.unmodelled("the approximate .f64 form")
    flushing = scalar == "bf16" and rounding.ftz
    if scalar == "bf16" and flushing != (x.name == "ex2"):
        raise x.unmodelled(f".{kind} {'with' if flushing else 'without'} .ftz")
    view = VIEW[kind]
    if kind == "f64":
        return elementwise(x, function, view, view)

    def compute(a: np.ndarray) -> np.ndarray:
        result = rounding.output(function(rounding.inputs(a, scalar)), scalar)
        return flush_bf16(result) if flushing else result

    return elementwise(x, compute, view, view)
