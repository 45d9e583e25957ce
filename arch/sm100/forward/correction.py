"""The correction role: one warpgroup multiplies O in tensor memory where a row's maximum was raised, off the
softmax's path, and in the end normalises O and hands it to the store role.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ...common.job import visits_of
from ...common.rules import Rules
from ...elementwise import where
from ...problem import Problem
from ..config import TILE_M, Config
from ..group import Group
from ..tmem import Plan, columns, load, registers, store, stored, times
from .job import Work, turns_of
from .output import CHUNK, Partial, Result


class Correction:
    """output: where O goes."""

    fetches_tiles = False

    def __init__(self, problem: Problem, config: Config, plan: Plan, output: Result | Partial):
        self.problem, self.config, self.plan, self.output = problem, config, plan, output
        self.group, self.dim_v = Group(config.ctas), problem.v_precision.padded(problem.head_dim_v)
        self.out_columns = problem.out_precision.padded(problem.head_dim_v)

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
        number = work.past.turns + turn
        place = self.plan.place(tile, number)
        work.edges.factors.of(place).wait_full(number // self.config.slots)
        factor = work.memory.factors[thread, self.plan.slot(number), tile]
        # One S of a tile was begun after O. With two, O is waited for even where nothing is to do: a wait
        # that is two turns late would take one for the other.
        if (turn > 0) & (self.config.slots > 1):
            work.edges.o.of(tile).wait_full(number - 1)
        if (turn > 0) & cute.arch.vote_any_sync(factor != 1.0):
            for c in cutlass.range_constexpr(0, self.dim_v, CHUNK):
                o = self.o(work, tile, c)
                values = registers(CHUNK)
                load(o, values, thread)
                times(values, factor, values)
                store(values, o, thread)
            stored()
        work.edges.s.of(place).warp_emptied(self.group, tensor=True)

    @cute.jit
    def finish(self, work: Work, tile: cutlass.Constexpr, turns: Int32):
        """O is normalised and leaves."""
        thread, final_scale = cute.arch.thread_idx()[0] % TILE_M, work.edges.final_scale.of(tile)
        final_scale.wait_full(work.past.tiles)
        factor = work.memory.factors[thread, self.plan.slots, tile]
        if cutlass.const_expr(self.config.is_persistent):
            final_scale.warp_emptied()
        if turns > 0:
            filling = work.past.turns + turns - 1 if self.config.slots > 1 else work.past.filled
            work.edges.o.of(tile).wait_full(filling)
        target = self.output.target(work, tile, thread)
        if turns > 0:
            # 0 times what P V made of hidden keys may be NaN.
            some_empty = cute.arch.vote_any_sync(factor == 0.0)
            for c in cutlass.range_constexpr(0, self.out_columns, CHUNK):
                values = registers(CHUNK)
                load(self.o(work, tile, c), values, thread)
                times(values, factor, values)
                if some_empty:
                    for i in cutlass.range_constexpr(CHUNK):
                        values[i] = where(factor == 0.0, 0.0, values[i])
                self.output.columns(target, c, values)
        else:
            zeros = registers(CHUNK)
            zeros.fill(0.0)
            for c in cutlass.range_constexpr(0, self.out_columns, CHUNK):
                self.output.columns(target, c, zeros)
        self.output.finish(work, tile)

    def o(self, work: Work, tile: int, first: int) -> cute.Tensor:
        """Some columns of O."""
        return columns(work.memory.tensor, self.plan.o(tile) + first, CHUNK)
