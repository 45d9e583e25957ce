"""FP8 products with wgmma, and the order of keys in which P and V meet.

Both operands have their k contiguous. An accumulator gives a thread t of four the columns 8c + 2t and
8c + 2t + 1; operand A in registers wants 4t … 4t + 3 of each 16. So that P can stay where it is, keys are
multiplied in another order: place 16h + 4t + 2j + e of 32 is key 16h + 8j + 2t + e, in P and in V.
"""

from __future__ import annotations

from collections.abc import Iterator

import cutlass.cute as cute
from cutlass import Float8E4M3FN, Float32
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from ..mma import ROWS

KEYS = 32  # of a step


def tiled_mma(columns: int, a_in_registers: bool, a_dtype: type, b_dtype: type) -> cute.TiledMma:
    """m64 x columns x k32 of 8 bits, summed in fp32."""
    source = warpgroup.OperandSource.RMEM if a_in_registers else warpgroup.OperandSource.SMEM
    major = OperandMajorMode.K
    shape = (ROWS, columns, KEYS)
    op = warpgroup.MmaF8Op(a_dtype, b_dtype, Float32, shape, source, major, major)
    return cute.make_tiled_mma(cute.make_mma_atom(op))


def to_p(s: cute.Tensor, p: cute.Tensor) -> None:
    """An accumulator's numbers, (e, row, 8-column groups), rounded, in operand A's order.

    That is (e, j, row, h, steps).
    """
    layout = cute.make_layout((2, 2, 2, 2, cute.size(s) // 16), stride=(1, 4, 2, 8, 16))
    ordered = cute.make_tensor(s.iterator, layout)
    for word in range(cute.size(p) // 4):
        four = cute.make_rmem_tensor(4, Float32)
        for i in range(4):
            four[i] = ordered[4 * word + i]
        part = cute.make_tensor(p.iterator + 4 * word, cute.make_layout(4))
        part.store(four.load().to(Float8E4M3FN))


def rounded(p: cute.Tensor) -> Iterator[tuple[int, Float32]]:
    """(row, number) of operand A's registers: what is multiplied."""
    for word in range(cute.size(p) // 4):
        four = cute.make_rmem_tensor(4, Float32)
        four.store(cute.make_tensor(p.iterator + 4 * word, cute.make_layout(4)).load().to(Float32))
        for i in range(4):
            yield word % 2, four[i]


def operand_a(p: cute.Tensor) -> cute.Tensor:
    """Registers in A's order: ((4, 2, 2), 1, steps)."""
    return cute.make_tensor(p.iterator, cute.make_layout(((4, 2, 2), 1, cute.size(p) // 16)))
