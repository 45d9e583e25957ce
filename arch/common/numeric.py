"""Arithmetic on pairs of fp32, and exponentials without the exponential unit.

Hardware of compute capability 10 does two fp32 operations per instruction; `Pair` is what they work on. The
functions below are written once over `Arithmetic`, so that a test runs the kernel's own lines on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass._mlir.dialects import arith

Pair = tuple[Float32, Float32]

# 2**f on -0.5 <= f <= 0.5, lowest power first: least largest relative error with 2**0 = 1 exactly. Degree 3
# would be off by 1.0e-4, which shows in the log-sum-exp of a row that one key dominates.
EXP2 = (1.0, 0.6931241933678396, 0.240240986112595, 0.055906425036457916, 0.009582853168908124)
EXP2_ERROR = 3e-6  # largest relative error of `exp2_pair`, rounding of its operations included
EXP2_LOWEST = -125.0  # below it the result stays 2**-125
_ROUND = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits


class Arithmetic(NamedTuple):
    """Operations on pairs."""

    fma: Callable[[Any, Any, Any], Any]
    add: Callable[[Any, Any], Any]
    larger: Callable[[Any, Any], Any]


def packed() -> Arithmetic:
    """Two operations per instruction (compute capability 10 and later)."""
    return Arithmetic(
        lambda a, b, c: cute.arch.fma_packed_f32x2(a, b, c, rnd="rn", ftz=False),
        lambda a, b: cute.arch.add_packed_f32x2(a, b, rnd="rn", ftz=False),
        lambda a, b: (cute.arch.fmax(a[0], b[0]), cute.arch.fmax(a[1], b[1])),
    )


def both(x: float | Float32) -> Pair:
    """The same number twice."""
    return Float32(x), Float32(x)


def exp2_pair(x: Pair, ops: Arithmetic) -> Pair:
    """2**x without ex2 (Cody and Waite 1980): x = n + f, a polynomial of f, n added to the exponent.

    x <= 127. Relative error below EXP2_ERROR for x >= EXP2_LOWEST, and 2**EXP2_LOWEST below that.
    """
    x = ops.larger(x, both(EXP2_LOWEST))
    shifted = ops.add(x, both(_ROUND))
    whole = ops.add(shifted, both(-_ROUND))
    f = ops.fma(whole, both(-1.0), x)
    power = both(EXP2[-1])
    for coefficient in reversed(EXP2[:-1]):
        power = ops.fma(power, f, both(coefficient))
    return tuple(_floating(_bits(p) + (_bits(n) << 23)) for p, n in zip(power, shifted, strict=True))


def _bits(x: Float32) -> Int32:
    return Int32(arith.bitcast(Int32.mlir_type, x.ir_value()))


def _floating(x: Int32) -> Float32:
    return Float32(arith.bitcast(Float32.mlir_type, x.ir_value()))
