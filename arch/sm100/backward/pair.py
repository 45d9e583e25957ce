"""A pair of CTAs, 128 keys each, that multiply together and sum half of the rows of dQ each (cta_group::2).

A's rows are keys in four of the products, 128 of each CTA, whose results it keeps; rows of Q in dQ, 64 each.
Of B a CTA brings half of the result's columns: half of the rows of Q and dO for S and dP, half of the columns
of dO, Q and K for dV, dK and dQ. So it has these in both forms, and of K those of both CTAs' keys.

    load --q_columns, k_columns, out_columns--> mma     half of the columns; K's once
    peer --peer_ds--> mma        dS of the other's keys and one's own rows: a copy between shared memories
    relay --relayed--> mma       the leader hears that the other CTA has got it: its idle mma warp tells

In shared memory dS is (keys, 64 rows) of the first CTA's keys, of the second's, and of one's own keys and the
other's rows, which are sent.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ...common.cluster import copy_to_peer
from ...common.key_block import KeyBlock, Launch
from ...common.operand import HeadRows
from ...common.rules import Rules
from ...elementwise import where
from ..mma import begin, tile_of
from .compute import Compute, Key
from .job import Edges, LoadEnds, Memory, MmaEnds, key_block
from .load import Load
from .mma import Mma
from .tuning import ROWS, THREADS

SEND = 4  # named barrier: of the warpgroup whose dS is sent
SENT = 2 * ROWS  # first row of what is sent
PEER_EDGES = ("peer_ds", "relayed")


class PairLoad(Load):
    """Brings either form of Q and dO, in the order in which products free their places."""

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
            slot = ends.out_columns.acquire_and_advance()
            self.copy(operands.out_columns, out_columns, row, moved.out_columns, slot)
            slot = ends.q_columns.acquire_and_advance()
            self.copy(operands.q_columns, q_columns, row, moved.q_columns, slot)
            slot = ends.k_columns.acquire_and_advance()
            self.copy(operands.k_columns, k_columns, block.tile_key, moved.k_columns, slot)
            for i in cutlass.range(visits.total - 1, unroll=1):
                row = self.first_row(visits, visits.after(visits.start, i + 1))
                slot = ends.q.acquire_and_advance()
                self.copy(operands.q, q, row + half, moved.q, slot)
                slot = ends.numbers.acquire_and_advance()
                self.numbers(block, row, memory, slot)
                slot = ends.grad_out.acquire_and_advance()
                self.copy(operands.grad_out, grad_out, row + half, moved.grad_out, slot)
                slot = ends.out_columns.acquire_and_advance()
                self.copy(operands.out_columns, out_columns, row, moved.out_columns, slot)
                slot = ends.q_columns.acquire_and_advance()
                self.copy(operands.q_columns, q_columns, row, moved.q_columns, slot)
            # The leader must not tell a CTA that has left that its tiles are free.
            ends.q.tail()
            ends.grad_out.tail()
            ends.out_columns.tail()
            ends.q_columns.tail()

    def of_keys(self, block: KeyBlock) -> tuple[HeadRows, ...]:
        """The keys' head's K, V and the CTA's columns of K."""
        names = ("k", "v", "k_columns")
        mapped = ((getattr(self.operands, name), getattr(block.maps, name)) for name in names)
        k, v, columns = (block.k_rows(*one) for one in mapped)
        return k, v, self.operands.k_columns.part(columns, block.rank)

    def of_rows(self, block: KeyBlock) -> tuple[HeadRows, ...]:
        """The query head's Q and dO, and the CTA's columns of them."""
        names = ("q", "grad_out", "q_columns", "out_columns")
        mapped = ((getattr(self.operands, name), getattr(block.maps, name)) for name in names)
        q, grad_out, *columns = (block.q_rows(*one) for one in mapped)
        parts = zip((self.operands.q_columns, self.operands.out_columns), columns, strict=True)
        return q, grad_out, *(operand.part(rows, block.rank) for operand, rows in parts)


class PairMma(Mma):
    """The leader's warp begins all products; the other's is the relay."""

    values, queries = "out_columns", "q_columns"

    @cute.jit
    def run(self, launch: Launch, memory: Memory, edges: Edges, ends: MmaEnds, warp: Int32):
        block, memory = key_block(self.problem, self.config, launch), memory.looked_up()
        rules = Rules.of(self.problem, block.call, block.sequence, block.head)
        visits = block.visits(self.problem, self.config, rules)
        if visits.any():
            if self.products.group.leads():
                self.begin_all(memory, edges, ends, Int32(visits.total))
            else:
                self.relay(edges, Int32(visits.total))

    @cute.jit
    def relay(self, edges: Edges, total: Int32):
        """Tell the leader whenever dS has come here."""
        for turn in cutlass.range(total, unroll=1):
            edges.peer_ds.wait_full(turn)
            edges.relayed.warp_filled(self.products.group)

    @cute.jit
    def begin_all(self, memory: Memory, edges: Edges, ends: MmaEnds, total: Int32):
        """dV(t), S(t+1), dK(t), dP(t+1), dQ(t): two products run while dS is on its way. See `PairPlan`."""
        ends.k.wait_and_advance()
        q = ends.q.wait_and_advance()
        self.begin_s(memory, edges, q.index, Int32(0))
        q.release()
        ends.v.wait_and_advance()
        out = ends.grad_out.wait_and_advance()
        self.begin_dp(memory, edges, out.index, Int32(0))
        out.release()
        ends.k_columns.wait_and_advance()
        for turn in cutlass.range(total - 1, unroll=1):
            ends.out_columns.wait()
            self.begin_grad_v(memory, edges, ends.out_columns, turn)
            ends.out_columns.advance()
            q = ends.q.wait_and_advance()
            edges.grad_q.wait_empty(turn)
            self.begin_s(memory, edges, q.index, turn + 1)
            q.release()
            ends.q_columns.wait()
            self.begin_grad_k(memory, edges, ends.q_columns, turn)
            ends.q_columns.advance()
            out = ends.grad_out.wait_and_advance()
            self.begin_dp(memory, edges, out.index, turn + 1)
            out.release()
            edges.s.wait_empty(turn + 2)
            self.begin_grad_q(memory, edges, turn, 0)
        ends.out_columns.wait()
        self.begin_grad_v(memory, edges, ends.out_columns, total - 1)
        ends.q_columns.wait()
        self.begin_grad_k(memory, edges, ends.q_columns, total - 1)
        edges.grad_q.wait_empty(total - 1)
        self.begin_grad_q(memory, edges, total - 1, 0)
        edges.grad_kv.filled_by_mma(self.products.group)

    def begin_grad_q(self, memory: Memory, edges: Edges, turn: Int32, filling: int) -> None:
        """Begin dQ = dS K of both CTAs' keys, when each has the other's dS."""
        make, tiles, plan = self.products, memory.tiles, self.products.plan
        edges.peer_ds.wait_full(turn)
        edges.relayed.wait_full(turn)
        keys = cute.local_tile(tiles.ds, (self.config.tile_n, self.config.cta_rows, 1), (0, 0, 0))
        mma = make.grad_q(filling, make.group)
        acc = make.result(mma, memory.tensor, plan.at("grad_q"), plan.grad_q_shape(filling))
        a = make.ds(keys)
        b = make.k_of_grad_q(tiles.moved.k_columns, plan.column(filling, 0), filling)
        begin(mma, acc, tile_of(a, 0, turn), tile_of(b, 0, turn), False)
        edges.grad_q.filled_by_mma(make.group)


class PairCompute(Compute):
    """A warpgroup has the rows of Q whose dQ one of the CTAs sums: what the other one sums is sent there."""

    def place_of_ds(self, key: Key, place: Int32) -> tuple[Int32, int]:
        rank = self.group.rank()
        return place + where(key.warpgroup == rank, rank * ROWS, SENT), 0

    def wait_until_free(self, edges: Edges, turn: Int32) -> None:
        """Until dQ of the visit before has been computed: dS was read in both CTAs, and so had been sent."""
        edges.grad_q.wait_full(turn - 1)

    @cute.jit
    def send(self, key: Key, memory: Memory, edges: Edges):
        """Begin copying dS, when the warpgroup has written it, to its place in the peer; expect as much."""
        rank, ds = self.group.rank(), memory.tiles.ds
        if key.warpgroup != rank:
            cute.arch.barrier(barrier_id=SEND, number_of_threads=THREADS)
            if key.thread < 32:
                with cute.arch.elect_one():
                    row, barrier = ROWS * self.config.cta_rows, edges.peer_ds.full
                    nbytes = row * ds.element_type.width // 8
                    cute.arch.mbarrier_arrive_and_expect_tx(barrier, nbytes)
                    target, source = ds.iterator + rank * row, ds.iterator + 2 * row
                    copy_to_peer(target, source, nbytes, barrier, 1 - rank)
