"""Products of tiles with wgmma: 64 rows per warpgroup, begun here and waited for later.

Between `begin` and `wait` the accumulator and a register operand belong to the hardware. The compiler
knows nothing of it, so `wait` pins every accumulator register: it passes through an empty instruction that
cannot move above the wait. Without it reads drift upwards, and ptxas serializes the products.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import OperandMajorMode, warp, warpgroup

from ..common.fragment import rows_by_columns
from ..common.order import pin

ROWS = 64


def tiled_mma(
    dtype: type, columns: int, a_in_registers: bool, b_transposed: bool, a_transposed: bool = False
) -> cute.TiledMma:
    """m64 x columns x k16; B is (columns, k) with k contiguous, or columns contiguous if `b_transposed`.

    a_transposed: A, in shared memory, is (rows, k) with rows contiguous.
    """
    source = warpgroup.OperandSource.RMEM if a_in_registers else warpgroup.OperandSource.SMEM
    a_major, b_major = (
        OperandMajorMode.MN if is_transposed else OperandMajorMode.K
        for is_transposed in (a_transposed, b_transposed)
    )
    op = warpgroup.MmaF16BF16Op(dtype, Float32, (ROWS, columns, 16), source, a_major, b_major)
    return cute.make_tiled_mma(cute.make_mma_atom(op))


def coordinates(mma: cute.TiledMma, columns: int, thread: Int32 | None = None) -> cute.Tensor:
    """(row, column) among the warpgroup's of each of a thread's elements: rows x columns.

    thread: of the warpgroup; None: the one that asks.
    """
    thread = cute.arch.thread_idx()[0] % 128 if thread is None else thread
    return rows_by_columns(mma.get_slice(thread).partition_C(cute.make_identity_tensor((ROWS, columns))))


def accumulator(columns: int) -> cute.Tensor:
    """Registers of one thread for 64 x columns: ((2, 2, columns / 8), 1, 1)."""
    return cute.make_rmem_tensor(cute.make_layout(((2, 2, columns // 8), 1, 1)), Float32)


def operand_a(p: cute.Tensor) -> cute.Tensor:
    """Registers in an accumulator's order as the A operand of the next product: ((2, 2, 2), 1, k / 16)."""
    return cute.make_tensor(p.iterator, cute.make_layout(((2, 2, 2), 1, cute.size(p) // 8)))


def begin(mma: cute.TiledMma, acc: cute.Tensor, a: cute.Tensor, b: cute.Tensor, accumulate: bool) -> None:
    """Begin acc = a b, or acc += a b; a and b are (mma, rows, k) fragments or descriptors."""
    begin_sum(mma, acc, [(a, b)], cute.size(a, mode=[2]), accumulate)


def begin_sum(
    mma: cute.TiledMma,
    acc: cute.Tensor,
    pairs: list[tuple[cute.Tensor, cute.Tensor]],
    steps: int,
    accumulate: bool = False,
) -> None:
    """Begin acc = a b + ..., or acc += a b + ..., of several pairs (a, b). steps: the first ones along k."""
    warpgroup.fence()
    for i, (a, b) in enumerate(pairs):
        for k in range(steps):
            mma.set(warpgroup.Field.ACCUMULATE, accumulate or i + k > 0)
            cute.gemm(mma, acc, a[None, None, k], b[None, None, k], acc)
    warpgroup.commit_group()


def to_shared(
    mma: cute.TiledMma, rounded: cute.Tensor, tile: cute.Tensor, thread: Int32, transposed: bool = False
) -> None:
    """Registers in an accumulator's order, of 16 bits, to a shared tile for wgmma or TMA to read.

    They may when the threads of the warpgroup have made it `visible`, and all have met. transposed: the tile,
    (rows, columns) as the accumulator, has rows contiguous.
    """
    matrices = 4 if cute.size(tile, mode=[1]) % 16 == 0 else 2
    atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(transposed, matrices), rounded.element_type)
    copy = cute.make_tiled_copy_C(atom, mma).get_slice(thread)
    cute.copy(copy, copy.retile(rounded), copy.partition_D(tile))


def visible() -> None:
    """What this thread has stored in shared memory, to wgmma and TMA."""
    cute.arch.fence_proxy("async.shared", space="cta")


def wait(younger: int, acc: cute.Tensor) -> None:
    """Wait until at most `younger` products are unfinished; `acc` is the one then complete."""
    warpgroup.wait_group(younger)
    pin(acc)
