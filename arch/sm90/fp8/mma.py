"""FP8 products with wgmma, and the order of keys in which P and V meet.

Both operands have their k contiguous. An accumulator gives a thread t of four the columns 8c + 2t and
8c + 2t + 1; operand A in registers wants 4t … 4t + 3 of each 16. So that P can stay where it is, keys are
multiplied in another order: place 16h + 4t + 2j + e of 32 is key 16h + 8j + 2t + e, in P and in V.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float8E4M3FN, Float16, Float32, Int32
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from ..mma import ROWS

KEYS = 32  # of a step
PACK = """{
.reg .b16 low, high;
cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
mov.b32 $0, {low, high};
}"""


def tiled_mma(columns: int, a_in_registers: bool, a_dtype: type, b_dtype: type) -> cute.TiledMma:
    """m64 x columns x k32 of 8 bits, summed in fp32."""
    source = warpgroup.OperandSource.RMEM if a_in_registers else warpgroup.OperandSource.SMEM
    major = OperandMajorMode.K
    shape = (ROWS, columns, KEYS)
    op = warpgroup.MmaF8Op(a_dtype, b_dtype, Float32, shape, source, major, major)
    return cute.make_tiled_mma(cute.make_mma_atom(op))


def words(s: cute.Tensor) -> cute.Tensor:
    """An accumulator's numbers, (e, row, 8-column groups), in operand A's order: (4, words).

    That is (e, j, row, h, steps). A word has four numbers of one row, and words take turns by row.
    """
    layout = cute.make_layout(((2, 2), (2, cute.size(s) // 8)), stride=((1, 4), (2, 8)))
    return cute.make_tensor(s.iterator, layout)


def rounded(four: list[Float32], merged: bool) -> tuple[Int32, cute.TensorSSA]:
    """Four numbers in 8 bits, as a word; the sums of two and two of what they have become, (2,) float16.

    merged: the second conversion makes the word. Otherwise its halves meet where it is used.
    """
    narrow, pairs = cute.make_rmem_tensor(4, Float8E4M3FN), cute.make_rmem_tensor((2, 2), Float16)
    word = cute.recast_tensor(narrow, Int32)
    if merged:
        values = [x.ir_value() for x in four]
        word[0] = Int32(llvm.inline_asm(Int32.mlir_type, values, PACK, "=r,f,f,f,f", has_side_effects=False))
    else:
        wide = cute.make_rmem_tensor(4, Float32)
        for i in range(4):
            wide[i] = four[i]
        narrow.store(wide.load().to(Float8E4M3FN))
    pairs.store(narrow.load().to(Float16).reshape((2, 2)))
    return word[0], pairs[None, 0].load() + pairs[None, 1].load()


def added(sums: list[cute.TensorSSA]) -> cute.TensorSSA:
    """Their sum, of two and two."""
    while len(sums) > 1:
        sums = [sums[i] + sums[i + 1] for i in range(0, len(sums) - 1, 2)] + sums[len(sums) & ~1 :]
    return sums[0]


def operand_a(p: cute.Tensor) -> cute.Tensor:
    """Registers in A's order: ((4, 2, 2), 1, steps)."""
    return cute.make_tensor(p.iterator, cute.make_layout(((4, 2, 2), 1, cute.size(p) // 16)))


def step(p: cute.Tensor, v: cute.Tensor, k: int) -> tuple[cute.Tensor, cute.Tensor]:
    """One step's operands, (mma, 1, 1) each, of P's registers and of (mma, steps) of V."""
    layout = cute.make_layout((v.layout.shape[0], 1, 1), stride=(v.layout.stride[0], 0, 0))
    of_p = cute.make_tensor(p.iterator + 16 * k, cute.make_layout(((4, 2, 2), 1, 1)))
    return of_p, cute.make_tensor(v[None, k].iterator, layout)
