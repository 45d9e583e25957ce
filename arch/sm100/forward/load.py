"""The load role: one warp brings Q's tiles, and blocks of K and V in the order of their visits, by TMA.

Of a pair, each CTA brings its own rows of Q, and its half of K's rows and of V's columns.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync

from ...common.blocks import Listed, Range
from ...common.job import sources, visits_of
from ...common.operand import HeadRows, Operand
from ...common.rules import Rules
from ...problem import Problem
from ..config import Config
from ..group import Group
from .job import LoadEnds, Work, first_row_of, turns_of


class Load:
    """q, k, v: the operands that it fills. It fetches the CTA's next tile, where that is not known."""

    fetches_tiles = True

    def __init__(self, problem: Problem, config: Config, q: Operand, k: Operand, v: Operand):
        self.problem, self.config = problem, config
        self.q, self.k, self.v = q, k, v

    @cute.jit
    def run(self, work: Work, ends: LoadEnds, warp: Int32):
        """One tile; the ends as they are then, and how many blocks it was."""
        job, tiles = work.job, work.memory.tiles
        rules = Rules.of(self.problem, job.call, job.sequence, job.heads.first)
        visits = visits_of(self.problem, self.config, job, rules)
        q, k, v = self.sources(work)
        for rows in (q, k, v):
            cpasync.prefetch_descriptor(rows.atom)
        if visits.any():
            # The first product needs K and one tile of Q.
            slot = ends.k.acquire_and_advance()
            self.copy(self.k, k, self.first_key(visits, visits.start), tiles.k, slot)
            for t in cutlass.range_constexpr(self.config.tiles):
                slot = ends.q.acquire_and_advance()
                self.copy(self.q, q, first_row_of(self.config, job, t), tiles.q, slot)
            for i in cutlass.range(visits.total - 1, unroll=1):
                place = visits.after(visits.start, i)
                slot = ends.v.acquire_and_advance()
                self.copy(self.v, v, self.first_key(visits, place), tiles.v, slot)
                slot = ends.k.acquire_and_advance()
                self.copy(self.k, k, self.first_key(visits, visits.after(place, 1)), tiles.k, slot)
            slot = ends.v.acquire_and_advance()
            self.copy(self.v, v, self.first_key(visits, visits.end), tiles.v, slot)
        return ends, turns_of(visits)

    @cute.jit
    def close(self, ends: LoadEnds, warp: Int32):
        if cutlass.const_expr(self.config.ctas > 1):
            # The leader must not tell a CTA that has left that its tiles are free.
            if cutlass.const_expr(self.config.is_persistent):
                ends.q.tail()
            ends.k.tail()
            ends.v.tail()

    def first_key(self, visits: Range | Listed, place: Int32) -> Int32:
        return visits.block(place) * self.config.tile_n

    def sources(self, work: Work) -> tuple[HeadRows, HeadRows, HeadRows]:
        q, k, v = sources(work.job, self.q, self.k, self.v)
        rank = Group(self.config.ctas).rank()
        return q, k._replace(start=k.start + rank * self.k.rows), self.v.part(v, rank)

    def copy(self, operand: Operand, rows: HeadRows, first: Int32, tiles: cute.Tensor, slot) -> None:
        """Begin copying rows `first` and on into the slot's tile."""
        for source, target in operand.copies(rows, first, tiles[None, None, slot.index]):
            cute.copy(rows.atom, source, target, tma_bar_ptr=slot.barrier)
