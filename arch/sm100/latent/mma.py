"""The mma role: one warp of the leader begins every product of both CTAs.

    for each block      S' = Q K[n-1], part by part       O += P V[n], part by part

S's of two blocks take turns: the softmax of the one runs beside the other's products. Products run in order,
so that one is begun over an S when the product is that reads what it became.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from ...common.job import visits_of
from ...common.rules import Rules
from ...problem import Problem
from ..forward.job import MmaEnds, Work, turns_of
from ..mma import begin, tile_of
from .config import Config, k_parts, v_parts
from .products import Products


class Mma:
    """products: the two, and where they write."""

    fetches_tiles = False

    def __init__(self, problem: Problem, config: Config, products: Products):
        self.problem, self.config, self.products = problem, config, products

    @cute.jit
    def run(self, work: Work, ends: MmaEnds, warp: Int32):
        """The CTA's tile; the ends as they are then, and how many blocks it was."""
        job = work.job
        rules = Rules.of(self.problem, job.call, job.sequence, job.heads.first)
        visits = visits_of(self.problem, self.config, job, rules)
        if self.products.group.leads() & visits.any():
            ends.q.wait_and_advance()
            for turn in cutlass.range(visits.total + 1, unroll=1):
                if turn < visits.total:
                    for part in cutlass.range_constexpr(k_parts(self.problem)):
                        slot = ends.k.wait_and_advance()
                        self.begin_s(work, turn, part, slot.index)
                        slot.release()
                    work.edges.s.of(self.products.plan.slot(turn)).filled_by_mma(self.products.group)
                if turn > 0:
                    self.wait_for_p(work, turn - 1)
                    for part in cutlass.range_constexpr(v_parts(self.problem)):
                        slot = ends.v.wait_and_advance()
                        self.begin_o(work, turn - 1, part, slot.index)
                        slot.release()
                    work.edges.o.filled_by_mma(self.products.group)
        return ends, turns_of(visits)

    def close(self, ends: MmaEnds, warp: Int32) -> None:
        """Whoever waits for the products sees them through."""

    def begin_s(self, work: Work, turn: Int32, part: int, place: Int32) -> None:
        """Begin S of block number `turn`, or add what one part of the columns makes."""
        memory, make = work.memory, self.products
        q, k = make.q(memory.q_parts), make.k(memory.tiles.k)
        s = make.s(memory.tensor, turn)
        begin(make.qk(make.group), s, tile_of(q, part, turn), tile_of(k, place, turn), part > 0)

    def wait_for_p(self, work: Work, turn: Int32) -> None:
        """Until P of block number `turn` is stored, and O rescaled."""
        work.edges.s.of(self.products.plan.slot(turn)).wait_empty(turn // self.config.slots + 1)

    def begin_o(self, work: Work, turn: Int32, part: int, place: Int32) -> None:
        """Begin O += P V of block number `turn` for a part of the columns."""
        memory, make = work.memory, self.products
        p, v = make.p(memory.p), make.v(memory.tiles.v)
        o = make.o(memory.tensor, part)
        begin(make.pv(make.group), o, tile_of(p, 0, turn), tile_of(v, place, turn), Boolean(turn > 0))
