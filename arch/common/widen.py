"""Numbers of 8 bits as ones of 16, exactly: by instructions where devices have them, from 8.9 on (`convert`),
or by integer operations on four at a time (`Widening`).

    e4m3   s eeee mmm        fp16   s eeeee mmmmmmmmmm
    e5m2   s eeeee mm        bf16   s eeeeeeee mmmmmmm

Exponent and mantissa move right by as many bits as the exponent becomes longer. That leaves a number too
small by a power of two, by how much the biases differ: one multiplication puts it right, subnormal numbers
too. What is infinite or no number gets an exponent of ones instead.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float16, Float32, Int32, Uint32
from cutlass._mlir.dialects import llvm

from ..precision import Precision
from ..widened import WidenedOperands, WidenedProblem

BYTES = 0x01010101  # times a byte: four of them


class Format(NamedTuple):
    """exponent, mantissa: their bits. first: of codes of 8 bits without a sign, the first that is no finite
    number.
    """

    exponent: int
    mantissa: int
    first: int | None = None

    @property
    def bias(self) -> int:
        return (1 << self.exponent - 1) - 1


FORMATS = {
    "float8_e4m3fn": Format(4, 3, 0x7F),
    "float8_e5m2": Format(5, 2, 0x7C),
    "float16": Format(5, 10),
    "bfloat16": Format(8, 7),
}
NEGATIVE_ZEROS = 0x80008000  # two of 16 bits, which added to anything leave it as it is


class Widening:
    """From one format to another."""

    def __init__(self, narrow: Precision, wide: Precision):
        self.narrow, self.wide, self.kind = FORMATS[narrow.name], FORMATS[wide.name], wide.name
        self.longer = self.wide.exponent - self.narrow.exponent

    @staticmethod
    def of(problem: WidenedProblem) -> Widening:
        """Of a problem's keys and values."""
        return Widening(problem.kv_precision, problem.precision)

    def four(self, word: Uint32) -> tuple[Uint32, Uint32]:
        """Four numbers, the first in the lowest byte, as two words of two."""
        if not self.longer:
            return _bytes(word, Uint32(0), 0x1404), _bytes(word, Uint32(0), 0x3424)
        value = word & 0x7F * BYTES
        wrong = value + (0x80 - self.narrow.first) * BYTES & 0x80 * BYTES
        high = (value >> self.longer) & (0x7F >> self.longer) * BYTES
        high = word & 0x80 * BYTES | high | wrong - (wrong >> self.longer)
        low = (word << 8 - self.longer) & (0xFF << 8 - self.longer & 0xFF) * BYTES
        return self._scaled(_bytes(high, low, 0x1504)), self._scaled(_bytes(high, low, 0x3726))

    def row(self, narrow: cute.Tensor, wide: cute.Tensor) -> None:
        """Registers of one format into registers of the other, as many."""
        words, pairs = (cute.recast_tensor(registers, Uint32) for registers in (narrow, wide))
        for i in range(cute.size(words)):
            pairs[2 * i], pairs[2 * i + 1] = self.four(words[i])

    def _scaled(self, pair: Uint32) -> Uint32:
        """Two numbers times the power of two that they lack."""
        power = (2 * self.wide.bias - self.narrow.bias) << self.wide.mantissa
        fma = f"fma.rn.{'f' if self.kind == 'float16' else 'bf'}16x2 $0, $1, $2, $3;"
        words = [Uint32(x).ir_value() for x in (pair, power * 0x10001, NEGATIVE_ZEROS)]
        return Uint32(llvm.inline_asm(Uint32.mlir_type, words, fma, "=r,r,r,r"))


def _bytes(a: Uint32, b: Uint32, chosen: int) -> Uint32:
    """Of the bytes of two words four, the first in the lowest digit of `chosen`."""
    return Uint32(cute.arch.prmt(a, b, chosen))


def convert(narrow: cute.Tensor, wide: cute.Tensor) -> None:
    """Registers of one format into as many of the other, by instructions; to bf16 by way of fp32."""
    numbers = narrow.load()
    if wide.element_type is Float16:
        wide.store(numbers.to(Float16))
    else:
        wide.store(numbers.to(Float32).to(wide.element_type))


def of_head(call: WidenedOperands, batch: Int32, head: Int32) -> tuple[WidenedOperands, Float32]:
    """A call as one KV head of a sequence has it, whose softmax scale is that of scores of numbers in the
    cache; and what its output is to be multiplied by.
    """
    scale = call.softmax_scale * call.k_scale[batch, head]
    return call._replace(softmax_scale=scale), call.v_scale[batch, head]
