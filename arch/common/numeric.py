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

from ..elementwise import maximum

Pair = tuple[Float32, Float32]

# 2**f on -0.5 <= f <= 0.5, lowest power first: minimax in relative error (Remez) with 2**0 = 1 exactly.
EXP2 = (1.0, 0.6931218, 0.24023691, 0.055886455, 0.009570102)
EXP2_ERROR = 4e-6  # largest relative error of `exp2_pair`, rounding of its operations included
EXP2_LOWEST = -125.0  # below it the result stays 2**-125
_ROUND = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits


class Arithmetic(NamedTuple):
    """Operations on pairs."""

    fma: Callable[[Any, Any, Any], Any]
    add: Callable[[Any, Any], Any]


def packed() -> Arithmetic:
    """Two operations per instruction (compute capability 10 and later)."""
    return Arithmetic(
        lambda a, b, c: cute.arch.fma_packed_f32x2(a, b, c, rnd="rn", ftz=False),
        lambda a, b: cute.arch.add_packed_f32x2(a, b, rnd="rn", ftz=False),
    )


def both(x: float | Float32) -> Pair:
    """The same number twice."""
    return Float32(x), Float32(x)


def exp2_pair(x: Pair, ops: Arithmetic) -> Pair:
    """2**x without ex2 (Cody and Waite 1980): x = n + f, a polynomial of f, n added to the exponent.

    x <= 127. Relative error below EXP2_ERROR for x >= EXP2_LOWEST, and 2**EXP2_LOWEST below that.
    """
    x = maximum(x[0], EXP2_LOWEST), maximum(x[1], EXP2_LOWEST)
    shifted = ops.add(x, both(_ROUND))
    whole = ops.add(shifted, both(-_ROUND))
    f = ops.add(x, (-whole[0], -whole[1]))
    power = both(EXP2[-1])
    for coefficient in reversed(EXP2[:-1]):
        power = ops.fma(power, f, both(coefficient))
    return tuple(_floating(_bits(p) + (_bits(n) << 23)) for p, n in zip(power, shifted, strict=True))


def _bits(x: Float32) -> Int32:
    return Int32(arith.bitcast(Int32.mlir_type, x.ir_value()))


def _floating(x: Int32) -> Float32:
    return Float32(arith.bitcast(Float32.mlir_type, x.ir_value()))
