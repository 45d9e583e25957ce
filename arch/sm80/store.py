"""What becomes of a row block's O and log-sum-exp: rows of the result, or one split's part of it.

    Result    O / row_sum in 16 bits, by way of Q's place in shared memory, so that whole lines leave
    Partial   O / row_sum in fp32, straight from registers: 4 lanes write 32 neighbouring bytes
"""

from __future__ import annotations

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
from cutlass.cute.nvgpu import CopyUniversalOp

from ..common.fragment import some_rows
from ..common.output import OutputRows, of_split, write_pairs
from ..problem import Problem
from .config import Config
from .copy import TileCopy
from .job import Tiles, Walk, rows_of_tile_in
from .mma import rounded


class _Store:
    def __init__(self, problem: Problem, config: Config):
        self.problem, self.config = problem, config

    def finish(self, walk: Walk, lse: cute.Tensor | None, o: cute.Tensor, row_of: Callable) -> None:
        """Normalise `o`, a thread's rows × columns of O, and write their log-sum-exp."""
        block, heads = walk.block, self.config.heads
        output = OutputRows.of(self.problem, block, block.heads.known(heads, block.head), lse)
        writes_lse = block.thread % 4 == 0
        if self.config.abreast > 1:
            writes_lse = writes_lse & (block.thread < self.config.row_threads)
        if heads > 1:
            writes_lse = writes_lse & (block.head < block.heads.end)
        output.finish(o, walk.softmax, row_of, writes_lse)


class Result(_Store):
    """copy: how a tile of the output leaves shared memory."""

    def __init__(self, problem: Problem, config: Config, copy: TileCopy):
        super().__init__(problem, config)
        self.copy = copy

    def tile(self, walk: Walk, tiles: Tiles, o: cute.Tensor, row_of: Callable, column_of: Callable) -> None:
        """Store `o`, a thread's rows × columns of O; row_of: in the sequence."""
        block, thread = walk.block, walk.block.thread
        self.finish(walk, block.call.lse, o, row_of)
        pairs = cute.make_copy_atom(CopyUniversalOp(), self.copy.dtype, num_bits_per_copy=32)
        to_shared = cute.make_tiled_copy_C(pairs, walk.mma_o).get_slice(thread)
        out = to_shared.retile(rounded(walk.acc_o, self.copy.dtype))
        if self.config.abreast > 1:  # other warps read the rows of Q that O takes the place of
            cute.arch.barrier()
        cute.copy(to_shared, out, to_shared.partition_D(tiles.out[None, None, 0]))
        cute.arch.barrier()
        rows = rows_of_tile_in(self.config, block, block.call.out, block.sequence.q_rows)
        chunks = self.copy.partition(tiles.out, thread)[None, None, None, 0]
        self.copy.store(chunks, rows, thread, block.sequence.q_rows - block.first_row)


class Partial(_Store):
    """One split's rows of the operands `out` and `lse`, whose first dimension counts the splits.

    Of one that its sequence does not have only the log-sum-exp is written, -inf.
    """

    @cute.jit
    def tile(
        self,
        walk: Walk,
        tiles: Tiles,
        o: cute.Tensor,
        row_of: cutlass.Constexpr,
        column_of: cutlass.Constexpr,
    ):
        block, dim_v = walk.block, self.problem.head_dim_v
        out, lse = (of_split(tensor, block.split) for tensor in (block.call.out, block.call.lse))
        self.finish(walk, lse, o, row_of)
        rows = block.sequence.q_rows_of(out, block.head)
        for r in cutlass.range_constexpr(cute.size(o, mode=[0])):
            row = row_of(r)
            exists = row < block.sequence.q_rows
            if cutlass.const_expr(self.config.heads > 1):
                exists = exists & (block.head < block.heads.end)
            if cutlass.const_expr(self.problem.scheduled):
                exists = exists & (block.split < block.splits)
            if exists:
                write_pairs(some_rows(o, r, 1), rows[row, None], column_of, dim_v)
