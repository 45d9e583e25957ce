"""What becomes of a Q tile's O and log-sum-exp: rows of the result, or one split's part of it.

    Result    O in 16 bits, by way of the Q tile's place in shared memory and TMA, which leaves out rows past
              the end
    Partial   O in fp32, straight from registers: a thread holds a row, and writes whole sectors of it

Both are given a thread's row of O, normalised, CHUNK columns at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from ...common.operand import Operand
from ...common.output import of_split
from ...problem import Problem
from ..tmem import registers
from ..tuning import TILE_M, Config
from .job import Job, Work, row_of_thread

CHUNK = 16  # columns of O in registers at a time
STORE = 1  # named barrier


class Target(NamedTuple):
    """Where a thread's row of O goes: row `row` of `rows` (rows, dim), where it `exists`; None: it does."""

    rows: cute.Tensor
    row: Int32
    exists: Boolean | None


class Result:
    """out: the operand that it fills."""

    def __init__(self, config: Config, out: Operand):
        self.config, self.out = config, out

    def lse(self, job: Job) -> cute.Tensor | None:
        """Where the log-sum-exp goes."""
        return job.call.lse

    def target(self, work: Work, tile: int, thread: Int32) -> Target:
        """Where the row of the tile's `thread` goes, when nothing there is under way any more."""
        if self.config.stays:
            self.await_copies(self.config.tiles - 1, cute.arch.make_warp_uniform(thread // 32))
            cute.arch.barrier(barrier_id=STORE, number_of_threads=TILE_M)
        return Target(work.memory.tiles.out[None, None, tile], thread, None)

    def columns(self, target: Target, first: int, o: cute.Tensor) -> None:
        """CHUNK columns of O from `first`, of a row."""
        rounded = registers(CHUNK, self.out.dtype)
        rounded.store(o.load().to(self.out.dtype))
        for i in range(0, CHUNK, 8):
            source = cute.make_tensor(rounded.iterator + i, cute.make_layout(8))
            row = target.rows[target.row, None]
            cute.autovec_copy(source, cute.local_tile(row, (8,), ((first + i) // 8,)))

    @cute.jit
    def finish(self, work: Work, tile: cutlass.Constexpr, first_row: Int32):
        """The tile's rows are in shared memory: one warp copies them to the rows from `first_row`."""
        job, thread = work.job, cute.arch.thread_idx()[0] % TILE_M
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier(barrier_id=STORE, number_of_threads=TILE_M)
        if cute.arch.make_warp_uniform(thread // 32) == 0:
            self.copy(job, work.memory.tiles.out[None, None, tile], first_row)

    def copy(self, job: Job, tile: cute.Tensor, first_row: Int32) -> None:
        """Begin copying a tile."""
        s = job.sequence
        rows = self.out.head_rows(job.maps.out, s.batch, job.heads.place, s.q_start, s.q_start + s.q_rows)
        target, source = self.out.sides(rows, first_row, tile)
        cute.copy(rows.atom, source, target)
        cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def await_copies(self, younger: cutlass.Constexpr, warp: Int32):
        """Wait until all but the `younger` last copies have read shared memory; one warp begins them."""
        if warp == 0:
            cute.arch.cp_async_bulk_wait_group(younger, read=True)

    def close(self, warp: Int32) -> None:
        """Shared memory must outlive the copies' reading of it."""
        self.await_copies(0, warp)


class Partial:
    """One split's rows of the operands `out` and `lse`, whose first dimension counts the splits."""

    def __init__(self, problem: Problem, config: Config):
        self.config, self.dim_v = config, problem.head_dim_v

    def lse(self, job: Job) -> cute.Tensor:
        return of_split(job.call.lse, job.split)

    def target(self, work: Work, tile: int, thread: Int32) -> Target:
        job = work.job
        row, head = row_of_thread(self.config, job, tile)
        rows = job.sequence.q_rows_of(of_split(job.call.out, job.split), head)
        return Target(rows, row, (row < job.sequence.q_rows) & (head < job.heads.end))

    @cute.jit
    def columns(self, target: Target, first: cutlass.Constexpr, o: cute.Tensor):
        if target.exists:
            row = target.rows[target.row, None]
            for i in cutlass.range_constexpr(0, min(CHUNK, self.dim_v - first), 4):
                source = cute.make_tensor(o.iterator + i, cute.make_layout(4))
                cute.autovec_copy(source, cute.local_tile(row, (4,), ((first + i) // 4,)))

    def finish(self, work: Work, tile: int, first_row: Int32) -> None:
        """All is written."""

    def close(self, warp: Int32) -> None:
        """Nothing is under way."""
