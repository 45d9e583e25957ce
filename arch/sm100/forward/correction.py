"""The correction role: one warpgroup multiplies O in tensor memory where a row's maximum was raised, off the
softmax's path, and in the end normalises O, hands it to the store role, and writes the log-sum-exp.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from ...common.numeric import both
from ...common.operand import padded
from ...common.output import OutputRows
from ...common.rules import Rules
from ...common.softmax import OnlineSoftmax
from ...elementwise import where
from ...problem import Problem
from ..group import Group
from ..tmem import Plan, columns, load, registers, store, stored
from ..tuning import TILE_M, Config
from .job import FACTOR, ROW_MAX, ROW_SUM, Job, Work, row_of_thread, turns_of, visits_of
from .output import CHUNK, Partial, Result


class Correction:
    """output: where O and the log-sum-exp go."""

    asks = False

    def __init__(self, problem: Problem, config: Config, plan: Plan, output: Result | Partial):
        self.problem, self.config, self.plan, self.output = problem, config, plan, output
        self.group, self.dim_v = Group(config.ctas), padded(problem.head_dim_v)

    @cute.jit
    def run(self, work: Work, ends: tuple, warp: Int32):
        """One tile; no ends, and how many blocks it was."""
        rules = Rules.of(self.problem, work.job.call, work.job.sequence, work.job.heads.first)
        turns = turns_of(visits_of(self.problem, self.config, work.job, rules))
        for turn in cutlass.range(turns, unroll=1):
            for t in cutlass.range_constexpr(self.config.tiles):
                self.rescale(work, t, turn)
        for t in cutlass.range_constexpr(self.config.tiles):
            self.finish(work, t, turns)
        return ends, turns

    def close(self, ends: tuple, warp: Int32) -> None:
        """The store role sees the rest through."""

    @cute.jit
    def rescale(self, work: Work, tile: cutlass.Constexpr, turn: Int32):
        """O *= factor, unless no row of the warp has a new maximum, or there is no O yet."""
        thread = cute.arch.thread_idx()[0] % TILE_M
        stats, number = work.edges.stats.of(tile), work.past.turns + turn
        stats.wait_full(number + work.past.tiles)
        factor = work.memory.stats[thread, FACTOR, tile]
        stats.warp_emptied()
        if turn > 0:
            # Even where nothing is to do: a wait that is two turns late would take one for the other.
            work.edges.o.of(tile).wait_full(number - 1)
        if (turn > 0) & cute.arch.vote_any_sync(factor != 1.0):
            for c in cutlass.range_constexpr(0, self.dim_v, CHUNK):
                o = self.o(work, tile, c)
                values = registers(CHUNK)
                load(o, values, thread)
                for i in cutlass.range_constexpr(0, CHUNK, 2):
                    values[i], values[i + 1] = cute.arch.mul_packed_f32x2(
                        (values[i], values[i + 1]), both(factor), rnd="rn", ftz=False
                    )
                store(values, o, thread)
            stored()
        work.edges.s.of(self.plan.place(tile, number)).warp_emptied(self.group)

    @cute.jit
    def finish(self, work: Work, tile: cutlass.Constexpr, turns: Int32):
        """O / row_sum and the log-sum-exp leave."""
        job, thread = work.job, cute.arch.thread_idx()[0] % TILE_M
        stats = work.edges.stats.of(tile)
        stats.wait_full(work.past.turns + work.past.tiles + turns)
        softmax = OnlineSoftmax.create(1, Float32(1.0), ())
        softmax.row_sum[0] = work.memory.stats[thread, ROW_SUM, tile]
        softmax.row_max[0] = work.memory.stats[thread, ROW_MAX, tile]
        if cutlass.const_expr(self.config.stays):
            stats.warp_emptied()
        row, head = row_of_thread(self.config, job, tile)
        exists = Boolean(True) if self.config.heads == 1 else head < job.heads.end
        factor = self.output_rows(job, head).close(softmax, 0, row, exists)
        if turns > 0:
            work.edges.o.of(tile).wait_full(work.past.turns + turns - 1)
        target = self.output.target(work, tile, thread)
        for c in cutlass.range_constexpr(0, self.dim_v, CHUNK):
            values = registers(CHUNK)
            values.fill(0.0)
            if turns > 0:
                load(self.o(work, tile, c), values, thread)
            for i in cutlass.range_constexpr(CHUNK):
                values[i] = where(factor == 0.0, 0.0, values[i] * factor)
            self.output.columns(target, c, values)
        self.output.finish(work, tile)

    def o(self, work: Work, tile: int, first: int) -> cute.Tensor:
        """Some columns of O."""
        return columns(work.memory.tensor, self.plan.o(tile) + first, CHUNK)

    def output_rows(self, job: Job, head: Int32) -> OutputRows:
        problem, call, sequence = self.problem, job.call, job.sequence
        head = job.heads.known(self.config.heads, head)
        return OutputRows(
            used=sequence.seqlen_q if problem.seqused_q else None,
            end=sequence.q_rows,
            lse=sequence.lse_of(self.output.lse(job), head) if problem.lse else None,
            sink=call.sink[head] if problem.sink else None,
            factor=call.keep_scale if problem.dropout else None,
        )
