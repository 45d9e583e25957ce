"""The mma role: one warp of the leader begins every product of both CTAs.

    for each block      S' = Q K[n-1], part by part       O += P V[n], part by part

S's of two blocks take turns: the softmax of the one runs beside the other's products. Products run in order,
so that one is begun over an S when the product is that reads what it became.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from ...common.blocks import Listed, Range
from ..forward.job import MmaEnds, Work
from ..forward.mma import Mma
from ..mma import begin, tile_of
from .config import k_parts, v_parts


class LatentMma(Mma):
    """The same for operands that come in parts. products: those of `.products`."""

    @cute.jit
    def begin_all(self, work: Work, visits: Range | Listed, ends: MmaEnds):
        ends.q.wait_and_advance()
        for turn in cutlass.range(visits.total + 1, unroll=1):
            if turn < visits.total:
                for part in cutlass.range_constexpr(k_parts(self.problem)):
                    slot = ends.k.wait_and_advance()
                    self.add_s(work, turn, part, slot.index)
                    slot.release()
                work.edges.s.of(self.products.plan.slot(turn)).filled_by_mma(self.products.group)
            if turn > 0:
                self.wait_for_p(work, turn - 1)
                for part in cutlass.range_constexpr(v_parts(self.problem)):
                    slot = ends.v.wait_and_advance()
                    self.add_o(work, turn - 1, part, slot.index)
                    slot.release()
                work.edges.o.filled_by_mma(self.products.group)
        return ends

    def add_s(self, work: Work, turn: Int32, part: int, place: Int32) -> None:
        """Begin S of block number `turn`, or add what a part of the columns makes to it."""
        memory, make = work.memory, self.products
        q, k = make.q(memory.q_parts), make.k(memory.tiles.k)
        s = make.s(memory.tensor, turn)
        begin(make.qk(make.group), s, tile_of(q, part, turn), tile_of(k, place, turn), part > 0)

    def wait_for_p(self, work: Work, turn: Int32) -> None:
        """Until P of block number `turn` is stored, and O rescaled."""
        work.edges.s.of(self.products.plan.slot(turn)).wait_empty(turn // self.config.slots + 1)

    def add_o(self, work: Work, turn: Int32, part: int, place: Int32) -> None:
        """Begin O += P V of block number `turn` for a part of the columns."""
        memory, make = work.memory, self.products
        p, v = make.p(memory.p), make.v(memory.tiles.v)
        o = make.o(memory.tensor, part)
        begin(make.pv(make.group), o, tile_of(p, 0, turn), tile_of(v, place, turn), Boolean(turn > 0))
