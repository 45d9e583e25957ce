"""Products of tiles with wgmma: 64 rows per warpgroup, begun here and waited for later.

Between `begin` and `wait` the accumulator and a register operand belong to the hardware. The compiler
knows nothing of it, so `wait` pins every accumulator register: it passes through an empty instruction that
cannot move above the wait. Without it reads drift upwards, and ptxas serializes the products.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float32
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from ..common.order import pin

ROWS = 64


def tiled_mma(dtype: type, columns: int, a_in_registers: bool, b_transposed: bool) -> cute.TiledMma:
    """m64 x columns x k16; B is (columns, k) with k contiguous, or columns contiguous if `b_transposed`."""
    source = warpgroup.OperandSource.RMEM if a_in_registers else warpgroup.OperandSource.SMEM
    major = OperandMajorMode.MN if b_transposed else OperandMajorMode.K
    op = warpgroup.MmaF16BF16Op(dtype, Float32, (ROWS, columns, 16), source, OperandMajorMode.K, major)
    return cute.make_tiled_mma(cute.make_mma_atom(op))


def accumulator(columns: int) -> cute.Tensor:
    """Registers of one thread for 64 x columns: ((2, 2, columns / 8), 1, 1)."""
    return cute.make_rmem_tensor(cute.make_layout(((2, 2, columns // 8), 1, 1)), Float32)


def operand_a(p: cute.Tensor) -> cute.Tensor:
    """Registers in an accumulator's order as the A operand of the next product: ((2, 2, 2), 1, k / 16)."""
    return cute.make_tensor(p.iterator, cute.make_layout(((2, 2, 2), 1, cute.size(p) // 8)))


def begin(mma: cute.TiledMma, acc: cute.Tensor, a: cute.Tensor, b: cute.Tensor, accumulate: bool) -> None:
    """Begin acc = a b, or acc += a b; a and b are (mma, rows, k) fragments or descriptors."""
    warpgroup.fence()
    for k in range(cute.size(a, mode=[2])):
        mma.set(warpgroup.Field.ACCUMULATE, accumulate or k > 0)
        cute.gemm(mma, acc, a[None, None, k], b[None, None, k], acc)
    warpgroup.commit_group()


def wait(younger: int, acc: cute.Tensor) -> None:
    """Wait until at most `younger` products are unfinished; `acc` is the one then complete."""
    warpgroup.wait_group(younger)
    pin(acc)
