"""What becomes of a tile's O and log-sum-exp: rows of the result, or one split's part of it.

    Result    O / row_sum in 16 bits, by way of shared memory and TMA, which leaves out rows past the end
    Partial   O / row_sum in fp32, straight from registers: 4 lanes write 32 neighbouring bytes, and shared
              memory has no room for a tile twice as large
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32
from cutlass.cute.nvgpu import warp

from ...common.fragment import rows_by_columns, some_rows
from ...common.job import Job, begin_store
from ...common.memory import Tiles
from ...common.operand import Operand
from ...common.output import OutputRows, of_split, write_pairs
from ...problem import Problem
from ..config import Config
from ..mma import ROWS, coordinates
from .rows import columns_of, row_of, rows_of

STORE = 4  # first of the named barriers, one for each 64 rows


class _Store:
    """mma: the product that made O."""

    def __init__(self, problem: Problem, config: Config, mma):
        self.problem, self.config, self.mma = problem, config, mma
        self.dim_v = problem.precision.padded(problem.head_dim_v) // config.abreast

    def normalise(self, job: Job, lse: cute.Tensor | None, state, warpgroup: Int32) -> cute.Tensor:
        """O of a thread's rows (rows, columns), normalised in place; the log-sum-exp is written."""
        o, at = rows_by_columns(state.o), coordinates(self.mma(), self.dim_v)
        count, lane = cute.size(o, mode=[0]) // len(state.shares), cute.arch.thread_idx()[0] % 4
        for i, share in enumerate(state.shares):
            first = i * count
            writes_lse = lane == 0
            if self.config.abreast > 1:
                writes_lse = writes_lse & (columns_of(self.config, warpgroup) == 0)
            if self.config.heads > 1:
                writes_lse = writes_lse & (share.head < job.heads.end)
            head = job.heads.known(self.config.heads, share.head)
            OutputRows.of(self.problem, job, head, lse).finish(
                some_rows(o, first, count),
                state.softmax.some_rows(first, count),
                lambda r, first=first: row_of(self.config, job, warpgroup, at[r + first, 0][0]),
                writes_lse,
            )
        return o


class Result(_Store):
    """out: the operand that it fills."""

    def __init__(self, problem: Problem, config: Config, mma, out: Operand):
        super().__init__(problem, config, mma)
        self.out = out

    @cute.jit
    def tile(self, job: Job, tiles: Tiles, state, warpgroup: Int32):
        self.normalise(job, job.call.lse, state, warpgroup)
        rows, thread = rows_of(self.config, warpgroup), cute.arch.thread_idx()[0] % 128
        tile, copying = tiles.out[None, None, rows], cute.arch.make_warp_uniform(thread // 32) == 0
        if cutlass.const_expr(self.config.abreast > 1):
            copying = copying & (columns_of(self.config, warpgroup) == 0)
        if cutlass.const_expr(self.config.persistent):
            self.await_copy(copying)
            self.meet(rows)
        out = cute.make_rmem_tensor(state.o.layout, self.out.dtype)
        out.store(state.o.load().to(self.out.dtype))
        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.out.dtype)
        copy = cute.make_tiled_copy_C(atom, self.mma()).get_slice(thread)
        cute.copy(copy, copy.retile(out), copy.partition_D(self.columns(tile, warpgroup)))
        cute.arch.fence_proxy("async.shared", space="cta")
        self.meet(rows)
        if copying:
            begin_store(job, self.out, tile, row_of(self.config, job, warpgroup, Int32(0)))

    def columns(self, tile: cute.Tensor, warpgroup: Int32) -> cute.Tensor:
        """A warpgroup's part of 64 rows of O."""
        if self.config.abreast == 1:
            return tile
        return cute.local_tile(tile, (ROWS, self.dim_v), (0, columns_of(self.config, warpgroup)))

    def meet(self, rows: Int32) -> None:
        """Wait for all who have these 64 rows."""
        threads = 128 * self.config.abreast
        cute.arch.barrier(barrier_id=STORE + rows, number_of_threads=threads)

    @cute.jit
    def await_copy(self, copying: Boolean):
        """Shared memory must outlive the copy's reading of it."""
        if copying:
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    def finish(self) -> None:
        """Before the CTA's shared memory goes."""
        self.await_copy(cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4 == 0)


class Partial(_Store):
    """One split's rows of the operands `out` and `lse`, whose first dimension counts the splits.

    Of one that its sequence does not have only the log-sum-exp is written, -inf.
    """

    @cute.jit
    def tile(self, job: Job, tiles: Tiles, state, warpgroup: Int32):
        out, lse = (of_split(tensor, job.split) for tensor in (job.call.out, job.call.lse))
        o, at = self.normalise(job, lse, state, warpgroup), coordinates(self.mma(), self.dim_v)
        count, dim_v = cute.size(o, mode=[0]) // len(state.shares), self.problem.head_dim_v
        before = columns_of(self.config, warpgroup) * self.dim_v
        for r in cutlass.range_constexpr(cute.size(o, mode=[0])):
            head, row = state.shares[r // count].head, row_of(self.config, job, warpgroup, at[r, 0][0])
            exists = (row < job.sequence.q_rows) & (head < job.heads.end)
            if cutlass.const_expr(self.problem.scheduled):
                exists = exists & (job.split < job.splits)
            if exists:
                target = job.sequence.q_rows_of(out, head)[row, None]
                write_pairs(some_rows(o, r, 1), target, lambda c: before + at[0, c][1], dim_v)

    def finish(self) -> None:
        """Nothing is under way."""
