"""A pair of CTAs with little room: of the next tile only S is computed beside a tile's own products.

Q and dO have one place each, to which their rows come, for S and dP, and then their columns, for dK and dV.
In tensor memory dP lies over half of S, and P over the other half: see `SerialPlan`. The rest is `pair`'s.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ..edge import after_sync, before_sync
from ..tmem import columns, load, registers, some_columns
from .config import THREADS, WARPGROUPS
from .job import Edges, Memory, MmaEnds
from .pair import DK, DP, DQ, DV, PairCompute, PairLoad, PairMma, Product, S
from .store import Store, Visit

READ = 5  # named barrier: of the compute warpgroups, when both have read S


class SerialLoad(PairLoad):
    """Brings either form of Q and dO to the same places."""

    first = "k", "q", "numbers", "v", "grad_out", "k_columns", "q_columns", "out_columns"
    then = "numbers", "q", "grad_out", "q_columns", "out_columns"


class SerialMma(PairMma):
    """dK before dV: the columns of dO come meanwhile, behind dP. The next S runs before dQ is complete."""

    order = DP._replace(ahead=False), DK, DV, DQ, S, DQ._replace(filling=1)

    def begin_first(self, memory: Memory, edges: Edges, ends: MmaEnds) -> MmaEnds:
        ends.k.wait_and_advance()
        ends = self.begin(S, memory, edges, ends, Int32(0), first=True)
        ends.v.wait_and_advance()
        return ends

    def begin(
        self, product: Product, memory: Memory, edges: Edges, ends: MmaEnds, turn: Int32, **at: bool
    ) -> MmaEnds:
        if product == DQ:
            ends.k_columns.wait()
        return super().begin(product, memory, edges, ends, turn, **at)

    def wait_for_room(self, product: Product, edges: Edges, turn: Int32, last: bool) -> None:
        """dP lies over S, and where dQ of the tile before was; dQ's second filling over its first."""
        filling = turn * self.products.plan.fillings + product.filling
        if product.name == "dp":
            edges.s.wait_empty(turn + 1)
            edges.grad_q.wait_empty(filling)
        elif product.filling:
            edges.grad_q.wait_empty(filling)


class SerialStore(Store):
    """The rest of dQ comes to the registers that the first of its columns have left."""

    @cute.jit
    def tile(self, visit: Visit, memory: Memory, edges: Edges, turn: Int32):
        thread, width, rest = cute.arch.thread_idx()[0] % THREADS, self.config.chunk, self.plan.width(1)
        place, chunks = self.plan.at("grad_q"), [self.plan.width(i) // width for i in range(2)]
        order = [(0, i) for i in range(chunks[0])] + [(1, i) for i in range(chunks[1])]
        values = registers(self.plan.width(0))
        edges.grad_q.wait_full(2 * turn)
        load(columns(memory.tensor, place, self.plan.width(0)), values, thread)
        edges.grad_q.warp_emptied(self.group)
        for i in cutlass.range_constexpr(len(order)):
            filling, chunk = order[i]
            if cutlass.const_expr(i == chunks[1]):
                edges.grad_q.wait_full(2 * turn + 1)
                load(columns(memory.tensor, place, rest), some_columns(values, 0, rest), thread)
                edges.grad_q.warp_emptied(self.group)
            held = some_columns(values, chunk * width, width)
            self.stage(visit, memory, held, turn * len(order) + i, order[i])


class SerialCompute(PairCompute):
    """P of the second warpgroup lies over what the first reads of S."""

    def wait_until_free(self, edges: Edges, turn: Int32) -> None:
        """dP is computed after dQ of the visit before, for which dS had come to both CTAs."""

    @cute.jit
    def wait_for_p(self, edges: Edges, turn: Int32):
        before_sync()
        cute.arch.barrier(barrier_id=READ, number_of_threads=THREADS * WARPGROUPS)
        after_sync()
