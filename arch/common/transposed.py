"""Copies by columns (`arch/transposed.py`): rows of 8 bits become columns, 16 rows in an order of their own.

A thread turns 16 rows x 4 columns by permutations of bytes. Eight lanes read 32 neighbouring bytes of a row,
four write 64 of a column.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32, Uint8, const_expr

from ..backward import SCRATCH_TILE
from ..elementwise import maximum, minimum, where
from ..transposed import GROUP, WARP_COLUMNS, WARP_ROWS, TransposeConfig, TransposeOperands, TransposeProblem
from .rows import Rows, rows_of
from .schedule import OneTile
from .sequence import extent

PATCH = 4  # columns of a thread
LOW, HIGH = 0x5140, 0x7362  # bytes 0, 1 or 2, 3 of two words by turns
FIRST, SECOND = 0x5410, 0x7632  # halves 0 or 1 of two words


class TransposeKernel:
    """The kernel for one problem: compiled with operands in their order and a stream."""

    def __init__(self, problem: TransposeProblem, config: TransposeConfig):
        self.problem, self.config = problem, config

    @cute.jit
    def __call__(self, *operands_and_stream):
        *operands, stream = operands_and_stream
        call = TransposeOperands(*operands)
        rows, batches = extent(call.rows, call.cu_seqlens, call.max_seqlen)
        schedule = OneTile(cute.ceil_div(rows, SCRATCH_TILE), call.rows.shape[-2], batches)
        block = (self.config.threads, 1, 1)
        self.kernel(call, schedule).launch(grid=schedule.grid(), block=block, stream=stream)

    @cute.kernel
    def kernel(self, call: TransposeOperands, schedule: OneTile):
        block, head, batch, _ = schedule.tile(cute.arch.block_idx()[0])
        rows = rows_of(call.cu_seqlens, call.rows.shape[1], batch)
        first_row = block * SCRATCH_TILE
        if first_row < rows.count:
            used = rows.count
            if const_expr(self.problem.used):
                used = call.seqused[batch]
            thread, groups = cute.arch.thread_idx()[0], WARP_ROWS // GROUP
            lane, warp, spans = thread % 32, thread // 32, SCRATCH_TILE // WARP_ROWS
            group = warp % spans * groups + lane // (32 // groups)
            column = warp // spans * WARP_COLUMNS + lane % (32 // groups) * PATCH
            row = first_row + group * GROUP
            words = self.read(rows.of(call.rows, head), row, column, used)
            self.write(call.columns, head, rows, row, column, words)

    def read(self, tensor: cute.Tensor, row: Int32, column: Int32, used: Int32) -> cute.Tensor:
        """A word of 4 columns of each of 16 rows from `row` on, 0 beyond what is in use.

        What is not there is read from where something is, so that all reads are under way together.
        """
        words, inside = cute.make_rmem_tensor(GROUP, Int32), column < self.problem.head_dim
        place = where(inside, column // PATCH, 0)
        for i in range(GROUP):
            bytes_of_row = cute.make_rmem_tensor(PATCH, Uint8)
            nearest = maximum(minimum(row + i, used - 1), 0)
            cute.autovec_copy(cute.local_tile(tensor[nearest, None], (PATCH,), (place,)), bytes_of_row)
            word = cute.recast_tensor(bytes_of_row, Int32)[0]
            words[i] = where(inside & (row + i < used), word, 0)
        return words

    def write(
        self, columns: cute.Tensor, head: Int32, rows: Rows, row: Int32, column: Int32, words: cute.Tensor
    ) -> None:
        """16 places of each of 4 columns, from scratch row `row` of the sequence on."""
        turned = cute.make_rmem_tensor((PATCH, GROUP // 4), Int32)
        for w in range(GROUP // 4):
            four = [words[self.problem.order[4 * w + i]] for i in range(4)]
            for c, word in enumerate(turn(four)):
                turned[c, w] = word
        place = cute.assume(rows.scratch + row, divby=GROUP)
        for c in range(PATCH):
            of_column = cute.make_rmem_tensor(GROUP // 4, Int32)
            for w in range(GROUP // 4):
                of_column[w] = turned[c, w]
            target = cute.domain_offset((place,), columns[head, column + c, None])
            target = cute.local_tile(target, (GROUP,), (0,))
            cute.autovec_copy(cute.recast_tensor(of_column, Uint8), target)


def turn(words: list[Int32]) -> list[Int32]:
    """Four words of a row's four bytes each, as four of a column's."""
    low, high = (
        [Int32(cute.arch.prmt(words[i], words[i + 1], chosen)) for i in (0, 2)] for chosen in (LOW, HIGH)
    )
    return [Int32(cute.arch.prmt(*pair, chosen)) for pair in (low, high) for chosen in (FIRST, SECOND)]
