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

from typing import NamedTuple

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
from .config import KEYS, OF_PAIRS, ROWS, THREADS
from .job import Edges, LoadEnds, Memory, MmaEnds, key_block
from .load import Load
from .mma import Mma

SEND = 4  # named barrier: of the warpgroup whose dS is sent
SENT = 2 * ROWS  # first row of what is sent
PEER_EDGES = ("peer_ds", "relayed")


class PairLoad(Load):
    """Brings either form of Q and dO, in the order in which products free their places.

    first, then: what is brought for the first tile, and for each of the others.
    """

    first = "k", "q", "numbers", "v", "grad_out", "out_columns", "q_columns", "k_columns"
    then = "q", "numbers", "grad_out", "out_columns", "q_columns"

    @cute.jit
    def run(self, launch: Launch, memory: Memory, ends: LoadEnds, warp: Int32):
        block = key_block(self.problem, self.config, launch)
        rules = Rules.of(self.problem, block.call, block.sequence, block.head)
        visits = block.visits(self.problem, self.config, rules)
        if visits.any():
            rows = self.rows(block)
            row = self.first_row(visits, visits.start)
            for i in cutlass.range_constexpr(len(self.first)):
                ends = self.bring(self.first[i], block, rows, row, memory, ends)
            for i in cutlass.range(visits.total - 1, unroll=1):
                row = self.first_row(visits, visits.after(visits.start, i + 1))
                for j in cutlass.range_constexpr(len(self.then)):
                    ends = self.bring(self.then[j], block, rows, row, memory, ends)
            # The leader must not tell a CTA that has left that its tiles are free.
            for name in self.refilled():
                getattr(ends, name).tail()

    def refilled(self) -> tuple[str, ...]:
        """Channels of tiles that come again."""
        return tuple(dict.fromkeys(self.config.channel(name) for name in self.then if name != "numbers"))

    def bring(
        self, name: str, block: KeyBlock, rows: dict[str, HeadRows], row: Int32, memory: Memory,
        ends: LoadEnds,
    ) -> LoadEnds:
        """Begin copying one thing of the tile whose first row is `row`."""
        slot = getattr(ends, self.config.channel(name)).acquire_and_advance()
        if name == "numbers":
            self.numbers(block, row, memory, slot)
        else:
            own = row + block.rank * self.config.cta_rows
            at = {"k": block.first_key, "v": block.first_key, "k_columns": block.tile_key}
            first = at.get(name, own if name in ("q", "grad_out") else row)
            operand, tiles = getattr(self.operands, name), getattr(memory.tiles.moved, name)
            self.copy(operand, rows[name], first, tiles, slot)
        return ends

    def rows(self, block: KeyBlock) -> dict[str, HeadRows]:
        """What is copied from: the keys' head's K and V, the query head's Q and dO, the CTA's columns."""
        found = {}
        for name in ("k", "v", "k_columns", "q", "grad_out", "q_columns", "out_columns"):
            operand, of = getattr(self.operands, name), block.k_rows if name in KEYS else block.q_rows
            rows = of(operand, getattr(block.maps, name))
            found[name] = operand.part(rows, block.rank) if name in OF_PAIRS else rows
        return found


class Product(NamedTuple):
    """One of a tile's products. ahead: it is the next tile's. filling: of dQ."""

    name: str
    ahead: bool = False
    filling: int = 0


S, DP = Product("s", ahead=True), Product("dp", ahead=True)
DV, DK, DQ = Product("grad_v"), Product("grad_k"), Product("grad_q")


class PairMma(Mma):
    """The leader's warp begins all products; the other's is the relay.

    order: of the products beside a tile, here so that two of them run while dS is on its way.
    """

    values, queries = "out_columns", "q_columns"
    order: tuple[Product, ...] = DV, S, DK, DP, DQ

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
        order = self.order
        ends = self.begin_first(memory, edges, ends)
        for turn in cutlass.range(total - 1, unroll=1):
            for i in cutlass.range_constexpr(len(order)):
                ends = self.begin(order[i], memory, edges, ends, turn + order[i].ahead)
        for i in cutlass.range_constexpr(len(order)):
            if cutlass.const_expr(not order[i].ahead):
                ends = self.begin(order[i], memory, edges, ends, total - 1, last=True)
        edges.grad_kv.filled_by_mma(self.products.group)

    def begin_first(self, memory: Memory, edges: Edges, ends: MmaEnds) -> MmaEnds:
        """Begin the first tile's products that are begun ahead. What comes once has come then."""
        ends.k.wait_and_advance()
        ends = self.begin(S, memory, edges, ends, Int32(0), first=True)
        ends.v.wait_and_advance()
        ends = self.begin(DP, memory, edges, ends, Int32(0), first=True)
        ends.k_columns.wait_and_advance()
        return ends

    def begin(
        self, product: Product, memory: Memory, edges: Edges, ends: MmaEnds, turn: Int32,
        first: bool = False, last: bool = False,
    ) -> MmaEnds:
        """Begin tile `turn`'s product, when its operands are there, and its place is free.

        first, last: for the first tile, and the last one; the first finds every place free.
        """
        name = product.name
        if name in ("s", "dp"):
            rows = ends.q if name == "s" else ends.grad_out
            slot = rows.wait_and_advance()
            if not first:
                self.wait_for_room(product, edges, turn, last)
            scores = self.begin_s if name == "s" else self.begin_dp
            scores(memory, edges, slot.index, turn)
            slot.release()
        elif name == "grad_q":
            self.wait_for_room(product, edges, turn, last)
            self.begin_grad_q(memory, edges, turn, product.filling)
        else:
            of_v = name == "grad_v"
            add = self.begin_grad_v if of_v else self.begin_grad_k
            held = getattr(ends, self.config.channel(self.values if of_v else self.queries))
            held.wait()
            add(memory, edges, held, turn)
            held.advance()
        return ends

    def wait_for_room(self, product: Product, edges: Edges, turn: Int32, last: bool) -> None:
        """Until nobody reads what lies where tile `turn`'s product comes: dQ and S lie over each other."""
        if product.name == "s":
            edges.grad_q.wait_empty(turn - 1)
        elif product.name == "grad_q" and last:
            edges.grad_q.wait_empty(turn)
        elif product.name == "grad_q":
            edges.s.wait_empty(turn + 2)

    def begin_grad_q(self, memory: Memory, edges: Edges, turn: Int32, filling: int) -> None:
        """Begin dQ = dS K of both CTAs' keys, when each has the other's dS."""
        make, tiles, plan = self.products, memory.tiles, self.products.plan
        edges.peer_ds.wait_full(turn)
        edges.relayed.wait_full(turn)
        mma = make.grad_q(filling, make.group)
        acc = make.result(mma, memory.tensor, plan.at("grad_q"), plan.grad_q_shape(filling))
        a = make.ds(self.own_rows(tiles.ds))
        b = make.k_of_grad_q(tiles.moved.k_columns, plan.column(filling, 0), filling)
        begin(mma, acc, tile_of(a, 0, turn), tile_of(b, 0, turn), False)
        edges.grad_q.filled_by_mma(make.group)

    def own_rows(self, ds: cute.Tensor) -> cute.Tensor:
        """dS (keys of both CTAs, the CTA's rows, 1)."""
        return cute.local_tile(ds, (self.config.tile_n, self.config.cta_rows, 1), (0, 0, 0))


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
                size = ROWS * self.config.cta_rows
                self.copy(edges, ds.iterator + rank * size, ds.iterator + 2 * size, size)

    def copy(self, edges: Edges, target: cute.Pointer, source: cute.Pointer, size: int) -> None:
        """Begin copying so many elements to `target` in the other CTA; expect as many from there."""
        barrier, nbytes = edges.peer_ds.full, self.problem.precision.nbytes(size)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, nbytes)
            copy_to_peer(target, source, nbytes, barrier, 1 - self.group.rank())
