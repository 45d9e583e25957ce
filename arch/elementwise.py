"""Elementwise functions that rules may use on symbols, host numbers, torch tensors and device values alike.

A rule (a mask or a score) is written once. It is traced on symbols into an expression, which kernels and
plain integers evaluate; the torch reference calls it on tensors. Operators and comparisons already mean the
same in all of these worlds; these functions are the rest. Those from `power` on are for expressions only:
they give device values Python's meaning of the operators.
"""

from __future__ import annotations

import math

from .symbol import BOOL, FLOAT, INT, Symbol, TableSymbol, call, joined, kind_of


def _world(*values) -> str:
    for value in values:
        if isinstance(value, (Symbol, TableSymbol)):
            return "symbol"
    for value in values:
        if isinstance(value, (int, float)):
            continue
        module = type(value).__module__.partition(".")[0]
        if module == "torch":
            return "torch"
        if module not in ("builtins", "numpy"):
            return "device"
    return "host"


def minimum(a, b):
    """The smaller of two integers (or floats), elementwise."""
    world = _world(a, b)
    if world == "symbol":
        return call("minimum", _number(a, b), a, b)
    if world == "host":
        return min(a, b)
    if world == "torch":
        return where(a < b, a, b)
    from cutlass import min as device_min

    return device_min(a, b)


def maximum(a, b):
    """The larger of two integers (or floats), elementwise."""
    world = _world(a, b)
    if world == "symbol":
        return call("maximum", _number(a, b), a, b)
    if world == "host":
        return max(a, b)
    if world == "torch":
        return where(a > b, a, b)
    from cutlass import max as device_max

    return device_max(a, b)


def where(condition, a, b):
    """`a` where `condition` holds, else `b`; neither side may have effects."""
    world = _world(condition, a, b)
    if world == "symbol":
        if kind_of(condition) != BOOL:
            raise TypeError(f"where(condition, a, b) is given {condition!r}; allowed: a comparison")
        return call("where", joined(a, b), condition, a, b)
    if world == "host":
        return a if condition else b
    if world == "torch":
        import torch

        return torch.where(condition, a, b)
    return _select(condition, a, b)


def _number(*values) -> str:
    """The kind of a number that may be any of these."""
    kind = joined(*values)
    return INT if kind == BOOL else kind


def _select(condition, a, b):
    """`where` on device values: select_ takes no Python bool and neither promotes nor wraps its operands."""
    from cutlass import as_numeric, select_

    if isinstance(condition, bool):
        return a if condition else b
    a, b = as_numeric(a), as_numeric(b)
    dtype = a.dtype if a.dtype is b.dtype else (a + b).dtype
    return dtype(select_(condition, a.to(dtype), b.to(dtype)))


def absolute(x):
    """|x|."""
    return abs(x) if _world(x) == "symbol" else where(x < 0, -x, x)


def to_float(x):
    """An integer as a floating-point number: fp32 on the device, fp64 elsewhere."""
    world = _world(x)
    if world == "symbol":
        return call("to_float", FLOAT, x)
    if world == "host":
        return float(x)
    if world == "torch":
        return x.double()
    from cutlass import Float32

    return Float32(x)


def exp(x):
    """e**x; on the device one multiplication and one ex2."""
    world = _world(x)
    if world == "symbol":
        return call("exp", FLOAT, x)
    if world == "host":
        return math.exp(x)
    if world == "torch":
        return x.exp()
    from cutlass.cute.math import exp2

    return exp2(x * math.log2(math.e), fastmath=True)


def tanh(x):
    """tanh(x).

    On the device 1 - 2 / (exp(2x) + 1): one ex2 and one rcp, absolute error below 1e-6, where the
    hardware's own tanh.approx is off by 5e-4, too much for a softcap of 30 in half precision.
    """
    world = _world(x)
    if world == "symbol":
        return call("tanh", FLOAT, x)
    if world == "host":
        return math.tanh(x)
    if world == "torch":
        return x.tanh()
    from cutlass.cute.arch import rcp_approx
    from cutlass.cute.math import exp2

    return 1.0 - 2.0 * rcp_approx(exp2(x * (2.0 * math.log2(math.e)), fastmath=True) + 1.0)


def load(table, *index):
    """table[index], each index clamped into its dimension; integers then count as 64-bit ones.

    Kernels evaluate rules on the padding rows and columns of a tile too; the clamp keeps those reads
    inside the table, and their results are never used.
    """
    world = _world(table, *index)
    if world == "symbol":
        if not isinstance(table, TableSymbol):
            raise TypeError(f"load is given a {type(table).__name__}; allowed: a table, a field of the rule")
        return table.load(index)
    shape = table.shape
    clamped = [maximum(minimum(i, n - 1), 0) for i, n in zip(index, shape, strict=True)]
    found = table[tuple(clamped)]
    if world == "torch":
        return found.double() if found.is_floating_point() else found.long()
    return _widened(found) if world == "device" else found


def _widened(x):
    """A device number as rules compute with it: float32, or an integer of 32 or 64 bits."""
    from cutlass import Float32, Int32

    if x.dtype.is_float:
        return Float32(x)
    return Int32(x) if x.dtype.width < 32 else x


def power(a, b):
    """a**b of floats; on the device exp2(b * log2(a)), so NaN for a negative a."""
    if _world(a, b) != "device":
        return a**b
    from cutlass import Float32
    from cutlass.cute.math import exp2, log2

    return exp2(Float32(b) * log2(Float32(a), fastmath=True), fastmath=True)


def log(x):
    """The natural logarithm of a float; NaN below 0. On the device one lg2 and one multiplication."""
    world = _world(x)
    if world == "symbol":
        return call("log", FLOAT, x)
    if world == "host":
        return math.log(x) if x > 0 else -math.inf if x == 0 else math.nan
    if world == "torch":
        return x.log()
    from cutlass import Float32
    from cutlass.cute.math import log2

    return log2(Float32(x), fastmath=True) * math.log(2.0)


def invert(x):
    """Logical not of truth values, ~ of integers."""
    world = _world(x)
    if world == "host":
        return not x if isinstance(x, bool) else ~x
    if world == "torch":
        return ~x
    from cutlass import Boolean

    return x == Boolean(False) if x.dtype is Boolean else ~x


def shift_left(x, by):
    """x << by, in the 64 bits of an integer; by 64 and more: 0."""
    if isinstance(by, int):
        return x << by if by < 64 else x & 0
    return where(by < 64, x << minimum(by, 63), 0)


def shift_right(x, by):
    """x >> by, which floors; by more than x has bits: 0 or -1."""
    return x >> minimum(by, 63 if _world(x, by) != "device" else x.dtype.width - 1)


def floor_divide(a, b):
    """a // b, rounded down."""
    if _world(a, b) != "device":
        return a // b
    if _is_float(a, b):
        from cutlass.cute.math import floor

        n = floor(a / b)
        rest = _remainder(a, b, n)
        return where(_wrong_sign(rest, b), n - 1.0, where(absolute(rest) >= absolute(b), n + 1.0, n))
    if _is_power_of_two(b):
        return a >> (b.bit_length() - 1)
    return (a - modulo(a, b)) // b


def modulo(a, b):
    """a % b, which has b's sign."""
    if _world(a, b) != "device":
        return a % b
    if _is_float(a, b):
        from cutlass.cute.math import floor

        rest = _remainder(a, b, floor(a / b))
        rest = where(_wrong_sign(rest, b), rest + b, rest)
        return where(absolute(rest) >= absolute(b), rest - b, rest)
    if _is_power_of_two(b):
        return a & (b - 1)
    rest = a % b  # has a's sign
    return where(_wrong_sign(rest, b), rest + b, rest)


def divide_unsigned(a, b):
    """a // b of integers that are not negative."""
    if _world(a, b) != "device":
        return a // b
    if _is_power_of_two(b):
        return a >> (b.bit_length() - 1)
    signed, unsigned = _unsigned(a, b)
    return signed(unsigned(a) // unsigned(b))


def remainder_unsigned(a, b):
    """a % b of integers that are not negative."""
    if _world(a, b) != "device":
        return a % b
    if _is_power_of_two(b):
        return a & (b - 1)
    signed, unsigned = _unsigned(a, b)
    return signed(unsigned(a) % unsigned(b))


def as_int32(x):
    """An integer in 32 bits, which must hold it."""
    if _world(x) != "device":
        return x
    from cutlass import Int32

    return Int32(x)


def as_int64(x):
    """An integer in 64 bits."""
    if _world(x) != "device":
        return x.long() if _world(x) == "torch" else x
    from cutlass import Int64

    return Int64(x)


def _remainder(a, b, n):
    """a - n * b of device floats, rounded once."""
    from cutlass import Float32
    from cutlass.cute.math import fma

    return fma(Float32(-n), Float32(b), Float32(a))


def _wrong_sign(rest, b):
    """Whether a remainder of a division by b is not 0 and has not b's sign."""
    return (rest != 0) & ((rest < 0) != (b < 0))


def _is_power_of_two(b) -> bool:
    return isinstance(b, int) and b > 0 and b & (b - 1) == 0


def _is_float(*values) -> bool:
    return any(isinstance(value, float) or getattr(value.dtype, "is_float", False)
               for value in values if not isinstance(value, int))


def _unsigned(*values):
    """The signed and unsigned integer type of device values."""
    from cutlass import Int32, Int64, Uint32, Uint64

    wide = any(not isinstance(value, int) and value.dtype.width == 64 for value in values)
    return (Int64, Uint64) if wide else (Int32, Uint32)
