"""P and dS of S^T in 8 bits, as operands of two products at once.

Of octets 2h and 2h + 1 of rows of Q a thread has two rows x two keys each, of which operand A wants one key's
four in a register, in the order of `arch/transposed.py`:

    P     an octet's word is its keys in turn: of two words the same halves become a key's (prmt)
    dS    an octet's word is its rows in turn, two keys to a row, which are a row's unit of 16 bits where it
          lies for dQ (`to_shared`); then of two words every other byte becomes a key's
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float8E4M3FN, Float32, Int32
from cutlass._mlir.dialects import llvm

from ...common.operand import Operand
from ...common.order import pin
from ...quantized_backward import DS_LIFT, P_LIFT
from ..backward.elements import Transposed
from ..fp8.matrices import address, swizzled, write

HALVES = 0x5410, 0x7632  # bytes of two words: the lower, and the upper halves
BYTES = 0x6420, 0x7531  # those with even, and with odd numbers
LANES = 32  # rows of Q that one stmatrix writes


class Rounded(Transposed):
    """As for 16 bits. P comes with its lift, and D negative and in dS's units: see `quantized_backward`."""

    def difference(self, dp: Float32, delta: Float32) -> Float32:
        return cute.math.fma(dp, Float32(2.0 ** (DS_LIFT - P_LIFT)), delta)

    def round(self, numbers: cute.Tensor, operand: cute.Tensor, i: int) -> None:
        """An octet's numbers into a word; every other octet's, and the word before, of P become operands."""
        words, is_p = cute.recast_tensor(operand, Int32), operand.element_type is Float8E4M3FN
        four = [numbers[r, c] for r, c in ((0, 0), (1, 0), (0, 1), (1, 1))]
        if is_p:
            words[i] = packed("e4m3", four)
        else:
            words[i] = packed("e5m2", [four[0], four[2], four[1], four[3]])
        pin(cute.make_tensor(words.iterator + i, cute.make_layout(1)))
        if is_p and i % 2:
            pair_up(words, i - 1, HALVES)


def packed(kind: str, four: list[Float32]) -> Int32:
    """Four numbers in 8 bits, the first in the lowest byte."""
    convert = f"cvt.rn.satfinite.{kind}x2.f32"
    halves = f"{convert} low, $2, $1; {convert} high, $4, $3;"
    code = f"{{ .reg .b16 low, high; {halves} mov.b32 $0, {{low, high}}; }}"
    values = [x.ir_value() for x in four]
    return Int32(llvm.inline_asm(Int32.mlir_type, values, code, "=r,f,f,f,f", has_side_effects=False))


def pair_up(words: cute.Tensor, first: int, chosen: tuple[int, int]) -> None:
    """Words `first` and the next one become those of the two keys."""
    pair = words[first], words[first + 1]
    for k in range(2):
        words[first + k] = Int32(cute.arch.prmt(*pair, chosen[k]))


def to_shared(ds: cute.Tensor, tile: cute.Tensor, operand: Operand, first_key: Int32, lane: Int32) -> None:
    """dS of a warp's 16 keys, from `first_key` of the tile on, to the tile: (rows, keys).

    A lane has the address of one row of 32; stmatrix turns units of 16 bits, a key's place by its lane's.
    """
    words, rows = cute.recast_tensor(ds, Int32), swizzled(operand, lane * operand.columns + first_key)
    for first in range(0, operand.rows, LANES):
        octets = cute.make_tensor(words.iterator + first // 8, cute.make_layout(4))
        write(octets, address(tile) + first * operand.columns + rows, transposed=True)


def to_operand(ds: cute.Tensor) -> None:
    """dS as it was for shared memory becomes operand A of dK."""
    words = cute.recast_tensor(ds, Int32)
    for first in range(0, cute.size(words), 2):
        pair_up(words, first, BYTES)
