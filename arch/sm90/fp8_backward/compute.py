"""The compute role in FP8: as for 16 bits, with sums in two levels.

    S^T = K Q^T and dP^T = V dO^T begun    wait S     P = 2**P_LIFT exp(S - LSE)
    wait dP    dS = P (dP 2**(DS_LIFT - P_LIFT) - D)     both in 8 bits, dS to shared, for all
    a piece of P^T dO begun     all meet     a piece of dQ = dS K begun
    then in turn: wait for the first of two products, which joins its sum, or leaves; begin the next

Hopper's FP8 products are summed with some 14 bits, so that no sum of several tiles is left to them (as in the
forward pass, `..fp8.accumulation`): pieces of P^T dO and dS^T Q, by columns, have accumulators of their own
and are added to dV and dK in fp32. All but dS in shared memory are operands in registers or by columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Float8E4M3FN, Float8E5M2, Int32

from ...common.key_block import KeyBlock
from ...common.rules import Rules
from ...common.softmax import LOG2_E
from ...transposed import GROUP
from ..backward.compute import Compute, Descriptors, Scores, as_a, as_b
from ..backward.config import ROWS
from ..backward.elements import Visit, Weighing
from ..backward.job import Edges, Sums, Tiles
from ..edge import Edge
from ..fp8.mma import KEYS, step, tiled_mma
from ..mma import accumulator, begin_sum, visible, wait
from .elements import Rounded, to_operand, to_shared
from .job import ds_operand


class Product(NamedTuple):
    """One of `columns` columns. begin, finish: with its accumulator, the latter when it is complete."""

    columns: int
    begin: Callable[[cute.Tensor], None]
    finish: Callable[[cute.Tensor], None]


class QuantizedCompute(Compute):
    """The same waits, other products."""

    def rules(self, block: KeyBlock) -> Rules:
        """With scores in units of their scales."""
        place, rules = (block.sequence.batch, block.kv_head), super().rules(block)
        return rules._replace(scale=rules.scale * (block.call.q_scale[place] * block.call.k_scale[place]))

    def weighing(self, block: KeyBlock, rules: Rules) -> Weighing:
        found = super().weighing(block, rules)
        return found if self.problem.score else found._replace(scale_log2=rules.scale * LOG2_E)

    def weights(self, acc: cute.Tensor) -> tuple[cute.Tensor, cute.Tensor]:
        p, ds = (cute.make_rmem_tensor(cute.size(acc), dtype) for dtype in (Float8E4M3FN, Float8E5M2))
        return p, ds

    def elements(self) -> Rounded:
        overlaps = self.config.overlap
        return Rounded(self.problem, self.scores(), self.config.tile_m, self.weights_are_p, not overlaps)

    def scores(self) -> cute.TiledMma:
        return tiled_mma(self.config.tile_m, False, self.dtype, self.dtype)

    def grad_kv(self, weights: type) -> cute.TiledMma:
        """Of a piece of dV or dK. weights: the type of P or dS."""
        return tiled_mma(self.config.piece_columns, True, weights, self.dtype)

    def grad_q(self) -> cute.TiledMma:
        """Of a piece of a warpgroup's part of dQ."""
        return tiled_mma(self.config.handed_columns, False, Float8E5M2, self.dtype)

    def descriptors(self, tiles: Tiles, warpgroup: Int32) -> Descriptors:
        config, moved, scores, grad_q = self.config, tiles.moved, self.scores(), self.grad_q()
        # 64 rows of dQ: the warpgroup's of its rows and all columns, or the other way round.
        rows, columns = (warpgroup, 0) if config.rows_apart else (0, warpgroup)
        ds = cute.local_tile(tiles.ds, (ROWS, config.cta_keys, config.ds_stages), (rows, 0, 0))
        k_shape = config.part_columns, config.cta_keys, 1
        k_columns = cute.local_tile(moved.k_columns, k_shape, (columns, 0, 0))
        return Descriptors(
            k=as_a(scores, moved.k[None, None, warpgroup]),
            q=as_b(scores, moved.q),
            v=as_a(scores, moved.v[None, None, warpgroup]),
            grad_out=as_b(scores, moved.grad_out),
            grad_out_as_b=as_b(self.grad_kv(Float8E4M3FN), moved.grad_out_columns),
            q_as_b=as_b(self.grad_kv(Float8E5M2), moved.q_columns),
            ds=as_a(grad_q, ds),
            k_as_b=as_b(grad_q, k_columns),
        )

    def gradients(self, visit: Visit, scores: Scores, sums: Sums, tiles: Tiles, edges: Edges) -> None:
        wait(0, scores.dp)
        self.differentiate(visit, scores)
        self.write(visit, scores.ds, tiles.ds)
        operands = visit.operands
        first, *others = self.pieces_of_sum(sums.v, scores.p, operands.grad_out_as_b, scores.out)
        of_q = self.pieces_of_q(visit, tiles, edges)
        of_k = self.pieces_of_sum(sums.k, scores.ds, operands.q_as_b, scores.q)
        two_at_a_time([first, *of_q, *others, *of_k])

    def pieces_of_sum(
        self, total: cute.Tensor, a: cute.Tensor, b: cute.Tensor, slot: Any
    ) -> Iterator[Product]:
        """Products that join dV or dK, the last of which releases the tile in `slot`."""
        columns = self.config.piece_columns
        count = 2 * cute.size(total) // columns
        for i in range(count):
            begin = partial(self.begin_piece, a, b[None, i, None, slot.index])
            part = cute.make_tensor(total.iterator + i * columns // 2, cute.make_layout(columns // 2))
            yield Product(columns, begin, partial(join, part, slot if i == count - 1 else None))

    def pieces_of_q(self, visit: Visit, tiles: Tiles, edges: Edges) -> Iterator[Product]:
        """Products that are the warpgroup's part of dQ."""
        columns = self.config.handed_columns
        count = self.config.part_columns // columns
        for i in range(count):
            begin = partial(self.begin_q_piece, visit, i)
            leave = partial(self.leave, visit, tiles.grad_q, edges.grad_q, visit.turn * count + i)
            yield Product(columns, begin, leave)

    def begin_piece(self, a: cute.Tensor, b: cute.Tensor, acc: cute.Tensor) -> None:
        """A piece of P^T dO or dS^T Q. b: (mma, k)."""
        steps = [step(a, b, k) for k in range(self.config.tile_m // KEYS)]
        begin_sum(self.grad_kv(a.element_type), acc, steps, 1)

    def write(self, visit: Visit, ds: cute.Tensor, tiles: cute.Tensor) -> None:
        """dS to shared memory, where all may read it when they have met; here it is an operand of dK then.

        Before the first product is begun, whose accumulator else takes registers beside S and dP.
        """
        tile, lane = tiles[None, None, visit.turn % self.config.ds_stages], visit.thread % 32
        first_key = visit.warpgroup * ROWS + visit.thread // 32 * GROUP
        to_shared(ds, tile, ds_operand(self.config), first_key, lane)
        visible()
        to_operand(ds)

    def begin_q_piece(self, visit: Visit, i: int, acc: cute.Tensor) -> None:
        """A piece of dQ = dS K, over the keys of all warpgroups, whose dS the first one waits for."""
        if i == 0:
            self.all_meet()
        ds, k = visit.operands.ds[None, None, None, visit.turn % self.config.ds_stages], visit.operands.k_as_b
        columns = k[None, i, None, 0]
        (mma, steps), (mma_step, steps_step) = columns.layout.shape, columns.layout.stride
        layout = cute.make_layout((mma, 1, steps), stride=(mma_step, 0, steps_step))
        pair = ds, cute.make_tensor(columns.iterator, layout)
        begin_sum(self.grad_q(), acc, [pair], self.config.cta_keys // KEYS)

    def leave(
        self, visit: Visit, numbers: cute.Tensor, edge: Edge, nth: Int32, acc: cute.Tensor
    ) -> None:
        """A piece of dQ, the nth of as many, goes to the store role."""
        self.hand_over(visit, acc, numbers, edge, nth)


def join(total: cute.Tensor, slot: Any, acc: cute.Tensor) -> None:
    """A product joins a sum. slot: of a tile that is read no more, or None."""
    for e in range(cute.size(acc)):
        total[e] = total[e] + acc[e]
    if slot is not None:
        slot.release()


def two_at_a_time(products: list[Product]) -> None:
    """Each but the first is begun before the one before it is finished.

    They take turns in two accumulators, so that one is begun where another has been. With accumulators of
    their own ptxas would begin all of them before it adds any.
    """
    widest = (max(product.columns for product in products[i::2]) for i in range(2))
    places, before = [accumulator(columns) for columns in widest], None
    for i, product in enumerate(products):
        acc = cute.make_tensor(places[i % 2].iterator, accumulator(product.columns).layout)
        product.begin(acc)
        if before is not None:
            wait(1, before[1])
            before[0].finish(before[1])
        before = product, acc
    wait(0, before[1])
    before[0].finish(before[1])
