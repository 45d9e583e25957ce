"""dQ, and dK and dV where heads share K and V: a factor times the fp32 sum, as rows of the gradient."""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from ...backward import PostprocessOperands, PostprocessProblem, scratch_columns
from ...common.element import element_type
from ...common.memory import SmemAllocator
from ...common.rows import Rows, rows_of
from ...common.schedule import OneTile
from ...common.sequence import extent
from ...common.sums import SummedTile
from ..copy import TileCopy, tile_layout
from ..mma import rounded
from .config import PostprocessConfig
from .grid import Grid


class PostprocessKernel:
    """The kernel for one problem and config: compiled with operands in their order and a stream."""

    def __init__(self, problem: PostprocessProblem, config: PostprocessConfig):
        self.problem, self.config = problem, config
        self.dtype = element_type(problem.precision)
        self.columns = scratch_columns(problem.head_dim)
        self.copy = TileCopy(self.dtype, config.rows, problem.head_dim, self.columns, config.threads)

    @cute.jit
    def __call__(self, *operands_and_stream):
        *operands, stream = operands_and_stream
        call = self.named(operands)
        rows, batches = extent(call.grad, call.cu_seqlens, call.max_seqlen)
        schedule = OneTile(cute.ceil_div(rows, self.config.rows), call.grad.shape[-2], batches)
        self.kernel(call, schedule).launch(
            grid=schedule.grid(), block=(self.config.threads, 1, 1), stream=stream
        )

    def named(self, operands: list) -> PostprocessOperands:
        """The operands of a launch, in their order, by their names."""
        return PostprocessOperands(*operands)

    def factor(self, call: PostprocessOperands, rows: Rows, head: Int32) -> Float32:
        """What sums are multiplied by."""
        return Float32(call.factor)

    @cute.kernel
    def kernel(self, call: Any, schedule: OneTile):
        block, head, batch, _ = schedule.tile(cute.arch.block_idx()[0])
        rows = rows_of(call.cu_seqlens, call.grad.shape[1], batch)
        first_row = block * self.config.rows
        if first_row < rows.count:
            self.tile(call, rows, head, first_row)

    @cute.jit
    def tile(self, call: Any, rows: Rows, head: Int32, first_row: Int32):
        """A tile by way of shared memory, so that whole lines leave."""
        thread = cute.arch.thread_idx()[0]
        grid = Grid(*self.config.grid, self.config.rows, self.columns, thread)
        acc = grid.accumulator()
        SummedTile.of(call.sums, head, rows.scratch + first_row, thread, self.config.threads).read(acc)
        factor = self.factor(call, rows, head)
        for i in cutlass.range_constexpr(cute.size(acc)):
            acc[i] = acc[i] * factor
        layout = tile_layout(self.config.rows, self.columns, 1)
        tile = SmemAllocator().allocate_tensor(self.dtype, layout, byte_alignment=128)
        grid.store(rounded(acc, self.dtype), tile)
        cute.arch.barrier()
        chunks = self.copy.partition(tile, thread)[None, None, None, 0]
        target = cute.domain_offset((first_row, 0), rows.of(call.grad, head))
        self.copy.store(chunks, target, thread, rows.count - first_row)
