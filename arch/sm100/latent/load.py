"""The load roles: one warp brings Q and K, one V, part by part in the order of visits, by TMA.

K is read twice: rows, of which a CTA has half, for S, and as V, of which it has half of the columns, for O.
Whichever comes second finds it in L2. Each warp waits for places of its own only.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ...common.job import sources, visits_of
from ...common.rules import Rules
from ..forward.job import LoadEnds, Work, first_row_of, turns_of
from ..forward.load import Load
from ..group import Group
from .config import k_parts, v_parts


class LoadK(Load):
    """A CTA's rows of Q, and its half of the rows of K's blocks."""

    fetches_tiles = False

    @cute.jit
    def run(self, work: Work, ends: LoadEnds, warp: Int32):
        """One tile; the ends as they are then, and how many blocks it was."""
        job, tiles = work.job, work.memory.tiles
        rules = Rules.of(self.problem, job.call, job.sequence, job.heads.first)
        visits = visits_of(self.problem, self.config, job, rules)
        q, k, _ = self.sources(work)
        if visits.any():
            slot = ends.q.acquire_and_advance()
            self.copy(self.q, q, first_row_of(self.config, job, 0), tiles.q, slot)
            for i in cutlass.range(visits.total, unroll=1):
                key = self.first_key(visits, visits.after(visits.start, i))
                for part in cutlass.range_constexpr(k_parts(self.problem)):
                    slot = ends.k.acquire_and_advance()
                    self.copy(self.k, self.k.part(k, part), key, tiles.k, slot)
        return ends, turns_of(visits)

    @cute.jit
    def close(self, ends: LoadEnds, warp: Int32):
        # The leader must not tell a CTA that has left that its parts are free.
        ends.k.tail()


class LoadV(Load):
    """Its half of V's columns, of all rows of the blocks."""

    fetches_tiles = False

    @cute.jit
    def run(self, work: Work, ends: LoadEnds, warp: Int32):
        """One tile; the ends as they are then, and how many blocks it was."""
        job, parts = work.job, v_parts(self.problem)
        rules = Rules.of(self.problem, job.call, job.sequence, job.heads.first)
        visits = visits_of(self.problem, self.config, job, rules)
        _, _, v = sources(job, self.q, self.k, self.v)
        if visits.any():
            first = Group(self.config.ctas).rank() * parts
            for i in cutlass.range(visits.total, unroll=1):
                key = self.first_key(visits, visits.after(visits.start, i))
                for part in cutlass.range_constexpr(parts):
                    slot = ends.v.acquire_and_advance()
                    self.copy(self.v, self.v.part(v, first + part), key, work.memory.tiles.v, slot)
        return ends, turns_of(visits)

    @cute.jit
    def close(self, ends: LoadEnds, warp: Int32):
        ends.v.tail()
