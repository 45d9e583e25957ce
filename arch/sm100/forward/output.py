"""Where the correction puts a Q tile's O and log-sum-exp: rows of the result, or one split's part of it.

    Result    O in 16 bits into shared memory, from where the store role copies it
    Partial   O in fp32, straight from registers: a thread holds a row, and writes whole sectors of it

Both are given a thread's row of O, normalised, CHUNK columns at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from ...common.job import Job
from ...common.output import of_split
from ...problem import Problem
from ..config import Config
from ..tmem import registers
from .job import Work, row_of_thread

CHUNK = 16  # columns of O in registers at a time


class Target(NamedTuple):
    """Where a thread's row of O goes: row `row` of `rows` (rows, dim), where it `exists`; None: it does.

    first: the column of it with which the thread's begin.
    """

    rows: cute.Tensor
    row: Int32
    exists: Boolean | None
    first: Int32 | int = 0


class Result:
    """dtype: of the output."""

    def __init__(self, config: Config, dtype: type):
        self.config, self.dtype = config, dtype

    def lse(self, job: Job) -> cute.Tensor | None:
        """Where the log-sum-exp goes."""
        return job.call.lse

    def target(self, work: Work, tile: int, thread: Int32) -> Target:
        """Where the row of the tile's `thread` goes, when nothing there is under way any more."""
        if self.config.is_persistent:
            work.edges.out.of(tile).wait_empty(work.past.tiles)
        return Target(work.memory.tiles.out[None, None, tile], thread, None)

    def columns(self, target: Target, first: int, o: cute.Tensor) -> None:
        """CHUNK columns of O from the thread's `first`, of a row."""
        rounded = registers(CHUNK, self.dtype)
        rounded.store(o.load().to(self.dtype))
        for i in range(0, CHUNK, 8):
            source = cute.make_tensor(rounded.iterator + i, cute.make_layout(8))
            row = target.rows[target.row, None]
            place = (target.first + first + i) // 8
            cute.autovec_copy(source, cute.local_tile(row, (8,), (place,)))

    def finish(self, work: Work, tile: int) -> None:
        """The warp's rows are in shared memory."""
        cute.arch.fence_proxy("async.shared", space="cta")
        work.edges.out.of(tile).warp_filled()


class Partial:
    """One split's rows of the operands `out` and `lse`, whose first dimension counts the splits.

    Of one that its sequence does not have only the log-sum-exp is written, -inf.
    """

    def __init__(self, problem: Problem, config: Config):
        self.config, self.dim_v, self.scheduled = config, problem.head_dim_v, problem.scheduled

    def lse(self, job: Job) -> cute.Tensor:
        return of_split(job.call.lse, job.split)

    def target(self, work: Work, tile: int, thread: Int32) -> Target:
        job = work.job
        row, head = row_of_thread(self.config, job, tile)
        rows = job.sequence.q_rows_of(of_split(job.call.out, job.split), head)
        exists = (row < job.sequence.q_rows) & (head < job.heads.end)
        if self.scheduled:
            exists = exists & (job.split < job.splits)
        return Target(rows, row, exists)

    @cute.jit
    def columns(self, target: Target, first: cutlass.Constexpr, o: cute.Tensor):
        if target.exists:
            row = target.rows[target.row, None]
            for i in cutlass.range_constexpr(0, min(CHUNK, self.dim_v - first), 4):
                source = cute.make_tensor(o.iterator + i, cute.make_layout(4))
                place = (target.first + first + i) // 4
                cute.autovec_copy(source, cute.local_tile(row, (4,), (place,)))

    def finish(self, work: Work, tile: int) -> None:
        """All is written."""
