"""Arithmetic on pairs of fp32, and exponentials without the exponential unit.

Hardware of compute capability 10 does two fp32 operations per instruction; `Pair` is what they work on. The
functions below are written once over `Arithmetic`, so that a test runs the kernel's own lines on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass._mlir.dialects import arith, llvm

Pair = tuple[Float32, Float32]

# 2**f on -0.5 <= f <= 0.5, lowest power first: least largest relative error with 2**0 = 1 exactly. Degree 3
# would be off by 1.0e-4, which shows in the log-sum-exp of a row that one key dominates.
EXP2 = (1.0, 0.6931241750717163, 0.24024099111557007, 0.055906426161527634, 0.009582852944731712)
EXP2_ERROR = 6e-6  # largest relative error of `exp2_pair`, rounding of its operations included
EXP2_LOWEST = -120.0  # of exponents; below it the result stays 2**-120
SPAN = 128.0  # from the lowest to the highest exponent
_ROUND = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits


class Arithmetic(NamedTuple):
    """Operations on pairs. saturated: fma, then clamped to [0, 1]."""

    fma: Callable[[Any, Any, Any], Any]
    add: Callable[[Any, Any], Any]
    saturated: Callable[[Any, Any, Any], Any]


def packed() -> Arithmetic:
    """Two operations per instruction (compute capability 10 and later)."""
    return Arithmetic(
        lambda a, b, c: cute.arch.fma_packed_f32x2(a, b, c, rnd="rn", ftz=False),
        lambda a, b: cute.arch.add_packed_f32x2(a, b, rnd="rn", ftz=False),
        lambda a, b, c: tuple(map(_saturated_fma, a, b, c)),
    )


def both(x: float | Float32) -> Pair:
    """The same number twice."""
    return Float32(x), Float32(x)


def in_span(scale: Float32, shift: Float32) -> tuple[Pair, Pair]:
    """What `exp2_pair` takes for 2**(s * scale + shift)."""
    return both(scale * (1.0 / SPAN)), both(shift * (1.0 / SPAN) - EXP2_LOWEST / SPAN)


def exp2_pair(s: Pair, scale: Pair, shift: Pair, ops: Arithmetic) -> Pair:
    """2**x without ex2 (Cody and Waite 1980): x = n + f, a polynomial of f, n added to the exponent.

    x = SPAN * (s * scale + shift) + EXP2_LOWEST, see `in_span`: clamping it then costs nothing. Relative
    error below EXP2_ERROR for EXP2_LOWEST <= x <= EXP2_LOWEST + SPAN; what lies beyond is taken for
    that end.
    """
    part = ops.saturated(s, scale, shift)
    shifted = ops.fma(part, both(SPAN), both(_ROUND + EXP2_LOWEST))
    whole = ops.add(shifted, both(-_ROUND - EXP2_LOWEST))
    f = ops.fma(whole, both(-1.0 / SPAN), part)  # exact, and in units of SPAN
    coefficients = [c * SPAN**i for i, c in enumerate(EXP2)]
    power = both(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        power = ops.fma(power, f, both(coefficient))
    return tuple(_floating(_bits(p) + (_bits(n) << 23)) for p, n in zip(power, shifted, strict=True))


def _saturated_fma(a: Float32, b: Float32, c: Float32) -> Float32:
    words = [x.ir_value() for x in (a, b, c)]
    return Float32(llvm.inline_asm(Float32.mlir_type, words, "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f"))


def _bits(x: Float32) -> Int32:
    return Int32(arith.bitcast(Int32.mlir_type, x.ir_value()))


def _floating(x: Int32) -> Float32:
    return Float32(arith.bitcast(Float32.mlir_type, x.ir_value()))
