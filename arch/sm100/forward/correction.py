"""The correction role: one warpgroup multiplies O in tensor memory where a row's maximum was raised, off the
softmax's path, and in the end normalises O, writes the log-sum-exp and stores O by TMA.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from ...common.numeric import both
from ...common.operand import Operand
from ...common.output import OutputRows
from ...common.rules import Rules
from ...common.softmax import OnlineSoftmax
from ...elementwise import where
from ...problem import Problem
from ..tmem import Plan, columns, load, registers, store, stored
from ..tuning import TILE_M, Config
from .job import FACTOR, ROW_MAX, ROW_SUM, Job, Work, turns_of, visits_of

CHUNK = 16  # columns of O in registers at a time
STORE = 1  # named barrier


class Correction:
    """out: the operand that it stores."""

    def __init__(self, problem: Problem, config: Config, plan: Plan, out: Operand):
        self.problem, self.config, self.plan, self.out = problem, config, plan, out

    @cute.jit
    def run(self, work: Work, warp: Int32):
        rules = Rules.of(self.problem, work.job.call, work.job.sequence, work.job.head)
        turns = turns_of(visits_of(self.problem, self.config, work.job, rules))
        for turn in cutlass.range(turns, unroll=1):
            for t in cutlass.range_constexpr(self.config.tiles):
                self.rescale(work, t, turn)
        for t in cutlass.range_constexpr(self.config.tiles):
            self.finish(work, t, turns)
        if warp == 0:
            # Shared memory must outlive the copies' reading of it.
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def rescale(self, work: Work, tile: cutlass.Constexpr, turn: Int32):
        """O *= factor, unless no row of the warp has a new maximum, or there is no O yet."""
        thread = cute.arch.thread_idx()[0] % TILE_M
        stats = work.edges.stats.of(tile)
        stats.wait_full(turn)
        factor = work.memory.stats[thread, FACTOR, tile]
        stats.warp_emptied()
        if turn > 0:
            # Even where nothing is to do: a wait that is two turns late would take one for the other.
            work.edges.o.of(tile).wait_full(turn - 1)
        if (turn > 0) & cute.arch.vote_any_sync(factor != 1.0):
            for c in cutlass.range_constexpr(0, self.plan.dim_v, CHUNK):
                o = self.o(work, tile, c)
                values = registers(CHUNK)
                load(o, values, thread)
                for i in cutlass.range_constexpr(0, CHUNK, 2):
                    values[i], values[i + 1] = cute.arch.mul_packed_f32x2(
                        (values[i], values[i + 1]), both(factor), rnd="rn", ftz=False
                    )
                store(values, o, thread)
            stored()
        work.edges.s.of(self.plan.place(tile, turn)).warp_emptied()

    @cute.jit
    def finish(self, work: Work, tile: cutlass.Constexpr, turns: Int32):
        """O / row_sum, by way of the Q tile's place in shared memory, and the log-sum-exp."""
        job, thread = work.job, cute.arch.thread_idx()[0] % TILE_M
        stats = work.edges.stats.of(tile)
        stats.wait_full(turns)
        softmax = OnlineSoftmax.create(1, Float32(1.0), ())
        softmax.row_sum[0] = work.memory.stats[thread, ROW_SUM, tile]
        softmax.row_max[0] = work.memory.stats[thread, ROW_MAX, tile]
        first_row = job.first_row + tile * TILE_M
        factor = self.output_rows(job).close(softmax, 0, first_row + thread, True)
        if turns > 0:
            work.edges.o.of(tile).wait_full(turns - 1)
        out = work.memory.tiles.out[None, None, tile]
        for c in cutlass.range_constexpr(0, self.plan.dim_v, CHUNK):
            values = registers(CHUNK)
            values.fill(0.0)
            if turns > 0:
                load(self.o(work, tile, c), values, thread)
            for i in cutlass.range_constexpr(CHUNK):
                values[i] = where(factor == 0.0, 0.0, values[i] * factor)
            rounded = registers(CHUNK, self.out.dtype)
            rounded.store(values.load().to(self.out.dtype))
            for i in cutlass.range_constexpr(0, CHUNK, 8):
                source = cute.make_tensor(rounded.iterator + i, cute.make_layout(8))
                cute.autovec_copy(source, cute.local_tile(out[thread, None], (8,), ((c + i) // 8,)))
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier(barrier_id=STORE, number_of_threads=TILE_M)
        if cute.arch.make_warp_uniform(thread // 32) == 0:
            self.store_tile(job, out, first_row)

    def o(self, work: Work, tile: int, first: int) -> cute.Tensor:
        """Some columns of O."""
        return columns(work.memory.tensor, self.plan.o(tile) + first, CHUNK)

    def output_rows(self, job: Job) -> OutputRows:
        problem, call, sequence = self.problem, job.call, job.sequence
        return OutputRows(
            used=sequence.seqlen_q if problem.seqused_q else None,
            end=sequence.q_rows,
            lse=sequence.lse_of(call.lse, job.head) if problem.lse else None,
            sink=call.sink[job.head] if problem.sink else None,
            factor=call.keep_scale if problem.dropout else None,
        )

    def store_tile(self, job: Job, tile: cute.Tensor, first_row: Int32) -> None:
        """One warp copies a tile to the rows from `first_row`."""
        s = job.sequence
        rows = self.out.head_rows(job.maps.out, s.batch, job.head, s.q_start, s.q_start + s.q_rows)
        target, source = self.out.sides(rows, first_row, tile)
        cute.copy(rows.atom, source, target)
        cute.arch.cp_async_bulk_commit_group()
