"""The mma role: one warp begins every product of the CTA.

    S = Q K,  dP = dO V
    for each query tile    dV += P^T dO    next S = Q K    dK += dS^T Q    dQ = dS K    next dP = dO V

So the next S is there when a tile's dS has been computed, and its exponentials run beside dK and dQ. Where P
lies apart from S the next S comes before dV; where there is one tile of Q, which dK reads last, behind dK and
the first part of dQ, so that Q comes beside that, and the exponentials run beside the rest and the next dP.
What may lie over what in tensor memory follows from this order: see `plan`.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, pipeline

from ...common.key_block import Launch
from ...common.rules import Rules
from ...problem import Problem
from ..mma import begin, tile_of
from .config import Config
from .job import Edges, Memory, MmaEnds, key_block
from .products import Products


class Mma:
    """products: the five, and where they write. values, queries: what dV and dK are made of."""

    values, queries = "grad_out", "q"

    def __init__(self, problem: Problem, config: Config, products: Products):
        self.problem, self.config, self.products = problem, config, products

    @cute.jit
    def run(self, launch: Launch, memory: Memory, edges: Edges, ends: MmaEnds, warp: Int32):
        block, memory = key_block(self.problem, self.config, launch), memory.looked_up()
        rules = Rules.of(self.problem, block.call, block.sequence, block.head)
        visits = block.visits(self.problem, self.config, rules)
        if self.products.group.leads() & visits.any():
            self.begin_all(memory, edges, ends, Int32(visits.total))

    @cute.jit
    def begin_all(self, memory: Memory, edges: Edges, ends: MmaEnds, total: Int32):
        """All products of `total` query tiles. held_q, held_out: the tiles that are to be released next."""
        held_q, held_out = ends.q.clone(), ends.grad_out.clone()
        ends.k.wait_and_advance()
        q = ends.q.wait_and_advance()
        self.begin_s(memory, edges, q.index, Int32(0))
        ends.v.wait_and_advance()
        out = ends.grad_out.wait_and_advance()
        self.begin_dp(memory, edges, out.index, Int32(0))
        for turn in cutlass.range(total - 1, unroll=1):
            if cutlass.const_expr(not self.config.p_apart):
                self.begin_grad_v(memory, edges, held_out, turn)
            if cutlass.const_expr(self.config.q_stages > 1):
                q = ends.q.wait_and_advance()
                self.begin_s(memory, edges, q.index, turn + 1)
            if cutlass.const_expr(self.config.p_apart):
                self.begin_grad_v(memory, edges, held_out, turn)
            held_out.advance()
            self.begin_grad_k(memory, edges, held_q, turn)
            held_q.advance()
            self.begin_grad_q(memory, edges, turn, 0)
            if cutlass.const_expr(self.config.q_stages == 1):
                q = ends.q.wait_and_advance()
                self.begin_s(memory, edges, q.index, turn + 1)
            for filling in cutlass.range_constexpr(1, self.products.plan.fillings):
                self.begin_grad_q(memory, edges, turn, filling)
            out = ends.grad_out.wait_and_advance()
            self.begin_dp(memory, edges, out.index, turn + 1)
        self.begin_grad_v(memory, edges, held_out, total - 1)
        self.begin_grad_k(memory, edges, held_q, total - 1)
        for filling in cutlass.range_constexpr(self.products.plan.fillings):
            self.begin_grad_q(memory, edges, total - 1, filling)
        edges.grad_kv.filled_by_mma(self.products.group)

    def begin_s(self, memory: Memory, edges: Edges, slot: Int32, turn: Int32) -> None:
        """Begin S^T = K Q^T of the query tile in `slot`; columns that are only padding are left out."""
        make, moved = self.products, memory.tiles.moved
        if self.config.p_apart:
            edges.s.wait_empty(turn)
        self.scores(memory, "s", make.keys(moved.k), make.rows(moved.q), (slot, turn), self.problem.head_dim)
        edges.s.filled_by_mma(make.group)

    def begin_dp(self, memory: Memory, edges: Edges, slot: Int32, turn: Int32) -> None:
        """Begin dP^T = V dO^T, likewise, when what lies over dP is of no use any more."""
        make, moved = self.products, memory.tiles.moved
        if not make.plan.apart:
            edges.grad_q.wait_empty(turn)
        a, b = make.keys(moved.v), make.rows(moved.grad_out)
        self.scores(memory, "dp", a, b, (slot, turn), self.problem.head_dim_v)
        edges.dp.filled_by_mma(make.group)

    def scores(
        self, memory: Memory, name: str, keys: cute.Tensor, rows: cute.Tensor, at: tuple, dim: int
    ) -> None:
        """Begin a product over a head dim. at: (slot, turn) of its rows."""
        make, (slot, turn), precision = self.products, at, self.problem.precision
        mma, plan = make.scores(make.group), make.plan
        acc = make.result(mma, memory.tensor, plan.at(name), (plan.keys, plan.rows))
        steps = precision.padded(dim) // precision.k_step
        begin(mma, acc, tile_of(keys, 0, turn), tile_of(rows, slot, turn), False, range(steps))

    def begin_grad_v(
        self, memory: Memory, edges: Edges, out: pipeline.PipelineConsumer, turn: Int32
    ) -> None:
        """Begin dV += P^T dO, when P is stored."""
        edges.p.wait_full(turn)
        self.add(memory, ("grad_v", "p"), getattr(memory.tiles.moved, self.values), out, turn)
        if self.config.p_apart:
            edges.p.emptied_by_mma(self.products.group)

    def begin_grad_k(self, memory: Memory, edges: Edges, q: pipeline.PipelineConsumer, turn: Int32) -> None:
        """Begin dK += dS^T Q, when dS is stored."""
        edges.ds.wait_full(turn)
        self.add(memory, ("grad_k", "ds"), getattr(memory.tiles.moved, self.queries), q, turn)

    def add(
        self, memory: Memory, names: tuple[str, str], tiles: cute.Tensor, held: pipeline.PipelineConsumer,
        turn: Int32,
    ) -> None:
        """Begin dV += P^T dO or dK += dS^T Q with the tile that is held, and release it."""
        make, (into, weights) = self.products, names
        columns = cute.size(tiles, mode=[1]) * make.group.ctas
        mma = make.grad_kv(weights, columns, make.group)
        acc = make.result(mma, memory.tensor, make.plan.at(into), (make.plan.keys, columns))
        b = tile_of(make.columns(tiles), held.current_handle().index, turn)
        begin(mma, acc, self.weights(memory, weights, columns), b, Boolean(turn > 0))
        held.release()

    def weights(self, memory: Memory, name: str, columns: int) -> cute.Tensor:
        """P^T or dS^T as A of dV or dK, which has so many columns."""
        return self.products.weights(memory.tensor, name, columns)

    def begin_grad_q(self, memory: Memory, edges: Edges, turn: Int32, filling: int) -> None:
        """Begin a filling of dQ = dS K, where it may lie."""
        make, tiles, plan = self.products, memory.tiles, self.products.plan
        if plan.apart:
            edges.grad_q.wait_empty(turn * plan.fillings + filling)
        a = make.ds(tiles.ds)
        for side in range(plan.sides):
            mma = make.grad_q(filling, make.group)
            acc = make.result(mma, memory.tensor, plan.side(side), plan.grad_q_shape(filling))
            b = make.k_of_grad_q(tiles.moved.k, plan.column(filling, side), filling)
            begin(mma, acc, tile_of(a, 0, turn), tile_of(b, 0, turn), False)
        edges.grad_q.filled_by_mma(make.group)
