"""A pair of CTAs with little room: of the next tile only S is computed beside a tile's own products.

Q and dO have one place each, to which their rows come, for S and dP, and then their columns, for dK and dV.
In tensor memory dP lies over half of S, and P over the other half: see `SerialPlan`. The rest is `pair`'s.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ...common.key_block import Launch
from ...common.rules import Rules
from ..edge import after_sync, before_sync
from ..tmem import columns, load, registers, some_columns
from .job import Edges, LoadEnds, Memory, MmaEnds, key_block
from .pair import PairCompute, PairLoad, PairMma
from .store import Store, Visit
from .tuning import THREADS, WARPGROUPS

READ = 5  # named barrier: of the compute warpgroups, when both have read S


class SerialLoad(PairLoad):
    """Brings either form of Q and dO to the same places, in the order in which products free them."""

    @cute.jit
    def run(self, launch: Launch, memory: Memory, ends: LoadEnds, warp: Int32):
        operands, moved = self.operands, memory.tiles.moved
        block = key_block(self.problem, self.config, launch)
        rules = Rules.of(self.problem, block.call, block.sequence, block.head)
        visits = block.visits(self.problem, self.config, rules)
        if visits.any():
            k, v, k_columns = self.of_keys(block)
            q, grad_out, q_columns, out_columns = self.of_rows(block)
            half = block.rank * self.config.cta_rows
            row = self.first_row(visits, visits.start)
            slot = ends.k.acquire_and_advance()
            self.copy(operands.k, k, block.first_key, moved.k, slot)
            slot = ends.q.acquire_and_advance()
            self.copy(operands.q, q, row + half, moved.q, slot)
            slot = ends.numbers.acquire_and_advance()
            self.numbers(block, row, memory, slot)
            slot = ends.v.acquire_and_advance()
            self.copy(operands.v, v, block.first_key, moved.v, slot)
            slot = ends.grad_out.acquire_and_advance()
            self.copy(operands.grad_out, grad_out, row + half, moved.grad_out, slot)
            slot = ends.k_columns.acquire_and_advance()
            self.copy(operands.k_columns, k_columns, block.tile_key, moved.k_columns, slot)
            slot = ends.q.acquire_and_advance()
            self.copy(operands.q_columns, q_columns, row, moved.q_columns, slot)
            slot = ends.grad_out.acquire_and_advance()
            self.copy(operands.out_columns, out_columns, row, moved.out_columns, slot)
            for i in cutlass.range(visits.total - 1, unroll=1):
                row = self.first_row(visits, visits.after(visits.start, i + 1))
                slot = ends.numbers.acquire_and_advance()
                self.numbers(block, row, memory, slot)
                slot = ends.q.acquire_and_advance()
                self.copy(operands.q, q, row + half, moved.q, slot)
                slot = ends.grad_out.acquire_and_advance()
                self.copy(operands.grad_out, grad_out, row + half, moved.grad_out, slot)
                slot = ends.q.acquire_and_advance()
                self.copy(operands.q_columns, q_columns, row, moved.q_columns, slot)
                slot = ends.grad_out.acquire_and_advance()
                self.copy(operands.out_columns, out_columns, row, moved.out_columns, slot)
            # The leader must not tell a CTA that has left that its tiles are free.
            ends.q.tail()
            ends.grad_out.tail()


class SerialMma(PairMma):
    """dK before dV: the columns of dO come meanwhile, behind dP. K and V come once: see `SerialPlan`."""

    @cute.jit
    def begin_all(self, memory: Memory, edges: Edges, ends: MmaEnds, total: Int32):
        ends.k.wait_and_advance()
        q = ends.q.wait_and_advance()
        self.begin_s(memory, edges, q.index, Int32(0))
        q.release()
        ends.v.wait_and_advance()
        for turn in cutlass.range(total - 1, unroll=1):
            out = ends.grad_out.wait_and_advance()
            self.begin_dp(memory, edges, out.index, turn)
            out.release()
            ends.q.wait()
            self.begin_grad_k(memory, edges, ends.q, turn)
            ends.q.advance()
            ends.grad_out.wait()
            self.begin_grad_v(memory, edges, ends.grad_out, turn)
            ends.grad_out.advance()
            ends.k_columns.wait()
            self.begin_grad_q(memory, edges, turn, 0)
            q = ends.q.wait_and_advance()
            self.begin_s(memory, edges, q.index, turn + 1)
            q.release()
            self.begin_grad_q(memory, edges, turn, 1)
        out = ends.grad_out.wait_and_advance()
        self.begin_dp(memory, edges, out.index, total - 1)
        out.release()
        ends.q.wait()
        self.begin_grad_k(memory, edges, ends.q, total - 1)
        ends.q.advance()
        ends.grad_out.wait()
        self.begin_grad_v(memory, edges, ends.grad_out, total - 1)
        ends.grad_out.advance()
        ends.k_columns.wait()
        for filling in cutlass.range_constexpr(self.products.plan.fillings):
            self.begin_grad_q(memory, edges, total - 1, filling)
        edges.grad_kv.filled_by_mma(self.products.group)

    def begin_dp(self, memory: Memory, edges: Edges, slot: Int32, turn: Int32) -> None:
        """Begin dP^T = V dO^T, when all have read S, and dQ of the tile before."""
        edges.s.wait_empty(turn + 1)
        edges.grad_q.wait_empty(turn * self.products.plan.fillings)
        super().begin_dp(memory, edges, slot, turn)

    def begin_grad_q(self, memory: Memory, edges: Edges, turn: Int32, filling: int) -> None:
        """Begin a filling of dQ, the second when the store roles have read the first."""
        if filling:
            edges.grad_q.wait_empty(turn * self.products.plan.fillings + filling)
        super().begin_grad_q(memory, edges, turn, filling)


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
