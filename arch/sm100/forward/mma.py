"""The mma role: one warp begins every product of the CTA.

    for each block of keys, for each Q tile:   O += P V   then   S = Q K of the next block

While one tile's products run, the other tile's softmax does. P stands in S's columns: the next S is begun
after the product that reads P, and products run in order.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ...common.rules import Rules
from ...problem import Problem
from ..mma import Products, begin
from ..tuning import Config
from .job import MmaEnds, Work, blocks_of, phases_of


class Mma:
    """products: the two tiled products, and where they write."""

    def __init__(self, problem: Problem, config: Config, products: Products):
        self.problem, self.config, self.products = problem, config, products

    @cute.jit
    def run(self, work: Work, ends: MmaEnds, warp: Int32):
        job, memory, edges = work.job, work.memory, work.edges
        tiles, make = range(self.config.tiles), self.products
        q, k, v = (make.q(memory.tiles.q), make.k(memory.tiles.k), make.v(memory.tiles.v))
        s, p, o = ([view(memory.tensor, t) for t in tiles] for view in (make.s, make.p, make.o))
        rules = Rules.of(self.problem, job.call, job.sequence, job.head)
        first, last = blocks_of(phases_of(self.problem, self.config, job, rules))
        if first < last:
            k_slot = ends.k.wait_and_advance()
            for t in cutlass.range_constexpr(self.config.tiles):
                ends.q.wait_and_advance()
                begin(self.products.qk(), s[t], q[None, None, None, t], k[None, None, None, k_slot.index], False)
                edges.s.of(t).filled_by_mma()
            k_slot.release()
            for i in cutlass.range(last - first - 1, unroll=1):
                v_slot = ends.v.wait_and_advance()
                k_slot = ends.k.wait_and_advance()
                for t in cutlass.range_constexpr(self.config.tiles):
                    edges.s.of(t).wait_empty(i + 1)
                    begin(self.products.pv(), o[t], p[t], v[None, None, None, v_slot.index], i > 0)
                    begin(self.products.qk(), s[t], q[None, None, None, t], k[None, None, None, k_slot.index], False)
                    edges.s.of(t).filled_by_mma()
                v_slot.release()
                k_slot.release()
            v_slot = ends.v.wait_and_advance()
            for t in cutlass.range_constexpr(self.config.tiles):
                edges.s.of(t).wait_empty(last - first)
                begin(self.products.pv(), o[t], p[t], v[None, None, None, v_slot.index], last - first > 1)
                edges.o.of(t).filled_by_mma()
            v_slot.release()
