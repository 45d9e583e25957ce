"""A pair of CTAs for wide heads: 64 keys each, whose sums leave tensor memory for S, dP and dQ beside them.

Every product's result has 64 rows of a CTA, 128 of the pair, and takes all lanes: the second half of a row's
columns lies in the lanes below the first's. As an operand in tensor memory it would have to lie in one lane.
So P and dS are operands from shared memory, where Q and dO have one place each, as in `serial`:

    weights[0]    P^T, (64 keys, 128 rows)                  A of dV
    weights[1]    dS^T, likewise                            A of dK
    ds            dS^T of both CTAs' keys, one's own rows   A of dQ; half of it comes from the other CTA

Nothing lies over anything, so that the order of products is chosen for what they wait for: columns of dO and
of Q come while dS is computed and sent, and the next tile's rows beside the products that follow.
"""

from __future__ import annotations

from functools import partial

import cutlass.cute as cute
from cutlass import Int32

from .compute import Key
from .config import THREADS
from .job import Edges, Memory
from .pair import DK, DP, DQ, DV, SEND, PairCompute, PairLoad, PairMma, Product, S
from .products import as_a
from .store import to_row

P, DS = 0, 1  # of the weights
HALF = THREADS // 2  # threads that have the rows of Q whose dQ one of the CTAs sums


class WideLoad(PairLoad):
    """Brings either form of Q and dO to the same places."""

    first = "k", "q", "numbers", "v", "grad_out", "q_columns", "out_columns", "k_columns"
    then = "numbers", "grad_out", "q", "q_columns", "out_columns"


class WideMma(PairMma):
    """In turn: what is read when dV, dK and dQ have been computed is free for the next tile."""

    order = DV, DK, DQ, S, DP

    def wait_for_room(self, product: Product, edges: Edges, turn: Int32, last: bool) -> None:
        """Until S, and dQ, of the tile before have been read; dP was when its dS was stored."""
        if product.name == "s":
            edges.s.wait_empty(turn)
        elif product.name == "grad_q":
            edges.grad_q.wait_empty(turn)

    def weights(self, memory: Memory, name: str, columns: int) -> cute.Tensor:
        make, place = self.products, P if name == "p" else DS
        tiles = as_a(partial(make.grad_kv, name, columns), make.group, memory.tiles.weights)
        return tiles[None, None, None, place]


class WideCompute(PairCompute):
    """Two threads of a warpgroup share a key: the one has rows of the first CTA's dQ, the other the second's.

    The warpgroups halve these.
    """

    def first(self, key: Key, unit: int) -> Int32:
        part = self.threads.part(key.thread, self.plan.half_rows // unit)
        return part + key.warpgroup * (self.rows // unit)

    def store(self, key: Key, memory: Memory, name: str, first: int, rounded: cute.Tensor) -> None:
        """Write P or dS to its place among the weights."""
        tile = memory.tiles.weights[None, None, P if name == "p" else DS]
        to_row(rounded, tile[key.place, None], self.first(key, 1) + first)

    def written(self, name: str) -> None:
        cute.arch.fence_proxy("async.shared", space="cta")

    @cute.jit
    def share(self, key: Key, memory: Memory, ds: cute.Tensor, place: Int32, first: int):
        """dS of the CTA's own rows, besides, to where both CTAs' keys are."""
        rank = self.group.rank()
        if key.thread // HALF == rank:
            row = memory.tiles.ds[rank * self.config.cta_keys + place, None, 0]
            to_row(ds, row, key.warpgroup * self.rows + first)

    def wait_until_free(self, edges: Edges, turn: Int32) -> None:
        """dP is computed after dQ of the tile before, which was the last to read dS."""

    @cute.jit
    def send(self, key: Key, memory: Memory, edges: Edges):
        """Begin copying dS of the other CTA's rows, when it is written, to its place; expect as much."""
        if key.thread // HALF != self.group.rank():
            cute.arch.barrier(barrier_id=SEND, number_of_threads=THREADS)
            if (key.warpgroup == 0) & (key.thread % HALF < 32):
                rank, size = self.group.rank(), self.config.cta_keys * self.config.cta_rows
                source = memory.tiles.weights[None, None, DS].iterator + (1 - rank) * size
                self.copy(edges, memory.tiles.ds.iterator + rank * size, source, size)
