"""The mma role: one warp begins every product of the CTA, in a pair that of the leader those of both.

    one S per tile:    for each block, for each Q tile   O += P V[n]       S = Q K[n-1]
    two S's per tile:  for each block, for each Q tile   S' = Q K[n-1]     O += P V[n]

With one, the other tile's softmax runs beside a tile's products; with two, the tile's own does. P stands in
S's columns: the next S there is begun after the product that reads P, and products run in order.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from ...common.blocks import Listed, Range
from ...common.job import visits_of
from ...common.rules import Rules
from ...problem import Problem
from ..config import Config
from ..mma import Products, begin, tile_of
from .job import MmaEnds, Work, turns_of


class Mma:
    """products: the two tiled products, and where they write."""

    fetches_tiles = False

    def __init__(self, problem: Problem, config: Config, products: Products):
        self.problem, self.config, self.products = problem, config, products

    @cute.jit
    def run(self, work: Work, ends: MmaEnds, warp: Int32):
        """One tile; the ends as they are then, and how many blocks it was."""
        job = work.job
        rules = Rules.of(self.problem, job.call, job.sequence, job.heads.first)
        visits = visits_of(self.problem, self.config, job, rules)
        if self.products.group.leads() & visits.any():
            ends = self.begin_all(work._replace(visits=visits), visits, ends)
        return ends, turns_of(visits)

    @cute.jit
    def begin_all(self, work: Work, visits: Range | Listed, ends: MmaEnds):
        k_slot, q_slots = ends.k.wait_and_advance(), []
        for t in cutlass.range_constexpr(self.config.tiles):
            q_slots.append(ends.q.wait_and_advance())
            self.begin_s(work, t, 0, k_slot.index)
        k_slot.release()
        for turn in cutlass.range(visits.total - 1, unroll=1):
            if cutlass.const_expr(self.config.slots == 1):
                v_slot = ends.v.wait_and_advance()
                k_slot = ends.k.wait_and_advance()
                for t in cutlass.range_constexpr(self.config.tiles):
                    self.begin_o(work, t, turn, v_slot.index, last=False)
                    self.begin_s(work, t, turn + 1, k_slot.index)
            else:
                k_slot = ends.k.wait_and_advance()
                for t in cutlass.range_constexpr(self.config.tiles):
                    self.begin_s(work, t, turn + 1, k_slot.index)
                v_slot = ends.v.wait_and_advance()
                for t in cutlass.range_constexpr(self.config.tiles):
                    self.begin_o(work, t, turn, v_slot.index, last=False)
            k_slot.release()
            v_slot.release()
        if cutlass.const_expr(self.config.is_persistent):
            for t in cutlass.range_constexpr(self.config.tiles):
                q_slots[t].release()
        v_slot = ends.v.wait_and_advance()
        for t in cutlass.range_constexpr(self.config.tiles):
            self.begin_o(work, t, visits.total - 1, v_slot.index, last=True)
        v_slot.release()
        return ends

    def close(self, ends: MmaEnds, warp: Int32) -> None:
        """Whoever waits for the products sees them through."""

    def begin_s(self, work: Work, tile: int, turn: Int32 | int, stage: Int32) -> None:
        """Begin S of the tile's block number `turn`."""
        memory, make, turn = work.memory, self.products, work.past.turns + turn
        q, k = make.q(memory.tiles.q), make.k(memory.tiles.k)
        s = make.s(memory.tensor, tile, turn)
        self.begin_qk(work, tile, turn, (s, tile_of(q, tile, turn), tile_of(k, stage, turn)))
        work.edges.s.of(make.plan.place(tile, turn)).filled_by_mma(make.group)

    def begin_o(self, work: Work, tile: int, turn: Int32, stage: Int32, last: bool) -> None:
        """Begin O += P V of the tile's block number `turn`, when O has been rescaled and P is stored: all but
        its tail, of which the product's last steps wait.
        """
        memory, make, slots = work.memory, self.products, self.config.slots
        adds, number, turn = Boolean(turn > 0), turn, work.past.turns + turn
        place = make.plan.place(tile, turn)
        work.edges.s.of(place).wait_empty(turn // slots + 1)
        p, v, o = make.p(memory.tensor, tile, turn), make.v(memory.tiles.v), make.o(memory.tensor, tile)
        v = tile_of(v, stage, turn)
        steps = cute.size(v, mode=[2])
        early = steps - steps * self.config.tail // self.config.tile_n
        operands = o, p, v
        self.begin_pv(work, tile, number, operands, adds, range(early))
        if early < steps:
            work.edges.tail.of(place).wait_full(turn // slots)
            self.begin_pv(work, tile, number, operands, True, range(early, steps))
        if last or self.config.slots > 1:
            work.edges.o.of(tile).filled_by_mma(make.group)

    def begin_qk(self, work: Work, tile: int, turn: Int32, operands: tuple) -> None:
        """operands: S, Q and K of block number `turn`."""
        begin(self.products.qk(), *operands, False)

    def begin_pv(
        self, work: Work, tile: int, turn: Int32, operands: tuple, adds: Boolean | bool, steps: range
    ) -> None:
        """operands: O, P and V of block number `turn`, of which `steps` along the keys are multiplied."""
        begin(self.products.pv(), *operands, adds, steps)
