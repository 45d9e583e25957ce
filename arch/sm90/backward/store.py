"""What leaves: dQ of every visit by the store role, dK and dV in the end by the warpgroups that have them.

dQ is added to its sum by bulk reductions, as much as a warpgroup hands over at a time, in the order of
`common.sums` for 128 threads: 64 rows are 64 * columns neighbouring numbers, columns in order, so that those
of some columns are neighbours, too.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass._mlir.dialects import llvm

from ...backward import scratch_columns
from ...common.blocks import Listed, Range
from ...common.element import element_type
from ...common.key_block import KeyBlock, Launch
from ...common.rules import Rules
from ...common.sums import SummedTile
from ...elementwise import maximum, minimum
from ...problem import Problem
from ..edge import Edge
from ..mma import tiled_mma, to_shared, visible
from .config import ROWS, THREADS, Tiling
from .job import GradientOperands, Sums, Tiles, key_block
from .turns import AsTheyCome, InTurns

RESULT = 2  # first of the named barriers, one per warpgroup


class Store:
    """A warp for each warpgroup, which brings its part of dQ away. turns: when it may."""

    def __init__(self, problem: Problem, config: Tiling, turns: AsTheyCome | InTurns):
        self.problem, self.config, self.turns = problem, config, turns
        self.columns = scratch_columns(problem.head_dim)

    @cute.jit
    def run(self, launch: Launch, tiles: Tiles, edge: Edge, warpgroup: Int32):
        block = key_block(self.problem, self.config, launch)
        if block.any():
            self.key_block(block, tiles.grad_q[None, warpgroup], edge.of(warpgroup), warpgroup)

    @cute.jit
    def key_block(self, block: KeyBlock, numbers: cute.Tensor, edge: Edge, warpgroup: Int32):
        rules = Rules.of(self.problem, block.call, block.sequence, block.head)
        visits = block.visits(self.problem, self.config, rules)
        config = self.config
        width, hands = config.handed_columns, config.part_columns // config.handed_columns
        part = block.rank * config.warpgroups + warpgroup  # of a pair's columns each CTA has half
        first_column = 0 if config.rows_apart else part * config.part_columns
        rows = warpgroup * ROWS if config.rows_apart else 0
        first_row = block.scratch_q(self.problem)
        for i in cutlass.range(visits.total, unroll=1):
            place = visits.after(visits.start, i)
            row = first_row + Int32(visits.block(place)) * self.config.tile_m
            sums = block.call.grad_q_sum[block.head, row + rows, None].iterator + first_column * ROWS
            for h in cutlass.range_constexpr(hands):
                # Of columns that are padded further than scratch is, so many are of use.
                count = minimum(maximum(self.columns - first_column - h * width, 0), width) * ROWS
                edge.wait_full(Int32(i) * hands + h)
                if cutlass.const_expr(h == 0):
                    self.turns.wait_q(block, rules, visits, place, row, part)
                self.bring_away(sums + h * width * ROWS, numbers, count)
                edge.warp_emptied()
            self.turns.pass_q(block, row, part)

    @cute.jit
    def bring_away(self, sums: cute.Pointer, numbers: cute.Tensor, count: Int32):
        """Add what was handed over; it may be overwritten behind this."""
        with cute.arch.elect_one():
            if count > 0:
                add(sums, numbers.iterator, count * 4)
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0, read=self.turns.only_read)


def add(sums: cute.Pointer, numbers: cute.Pointer, nbytes: Int32) -> None:
    """Begin adding fp32 numbers in shared memory to sums in global memory, a multiple of 16 bytes."""
    operands = [sums.toint().ir_value(), numbers.toint().to(Int32).ir_value(), Int32(nbytes).ir_value()]
    instruction = "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [$0], [$1], $2;"
    llvm.inline_asm(None, operands, instruction, "l,r,r", has_side_effects=True)


class Result:
    """dK and dV of a warpgroup's keys: rows of the gradients, by way of K's and V's places and TMA.

    Where query heads share keys they are added to sums instead, as dQ is.
    """

    def __init__(
        self, problem: Problem, config: Tiling, operands: GradientOperands, turns: AsTheyCome | InTurns
    ):
        self.problem, self.config, self.operands, self.turns = problem, config, operands, turns
        self.dtype = element_type(problem.precision)

    def store(
        self, block: KeyBlock, tiles: Tiles, sums: Sums, visits: Range | Listed, warpgroup: Int32
    ) -> None:
        """When all warpgroups have read K and V for the last time, unless heads share them."""
        if not self.problem.gqa:
            self.write(block, tiles, sums, warpgroup)
        elif self.config.ctas == 1:
            self.add_in_turn(block, sums, visits, warpgroup)
        else:
            self.add_own(block, sums, visits, warpgroup)

    @cute.jit
    def add_own(self, block: KeyBlock, sums: Sums, visits: cutlass.Constexpr, warpgroup: Int32):
        """A CTA of a pair may have no keys, and then no scratch rows either."""
        if block.first_key < block.sequence.k_rows:
            self.add_in_turn(block, sums, visits, warpgroup)

    def add_in_turn(self, block: KeyBlock, sums: Sums, visits: Range | Listed, warpgroup: Int32) -> None:
        row = block.scratch_k(self.problem)
        self.turns.wait_k(block, row)
        self.add(block, sums, visits, row + warpgroup * self.config.keys)
        self.turns.pass_k(block, row)

    @cute.jit
    def add(self, block: KeyBlock, sums: Sums, visits: cutlass.Constexpr, row: Int32):
        """To the sums, from scratch row `row` on."""
        if visits.any():
            thread = cute.arch.thread_idx()[0] % THREADS
            for total, acc, dim in (
                (block.call.grad_k_sum, sums.k, self.problem.head_dim),
                (block.call.grad_v_sum, sums.v, self.problem.head_dim_v),
            ):
                used = cute.make_tensor(acc.iterator, cute.make_layout(scratch_columns(dim) // 2))
                SummedTile.of(total, block.kv_head, row, thread, THREADS).add(used)

    @cute.jit
    def write(self, block: KeyBlock, tiles: Tiles, sums: Sums, warpgroup: Int32):
        scale, operands, maps = Float32(block.call.softmax_scale), self.operands, block.maps
        sums.k.store(sums.k.load() * scale)
        if cutlass.const_expr(self.problem.dropout):
            sums.v.store(sums.v.load() * block.call.keep_scale)
        tile_k, tile_v = (
            tile[None, None, warpgroup] for tile in (tiles.moved.grad_k, tiles.moved.grad_v)
        )
        self.to_tile(sums.k, tile_k, self.config.columns)
        self.to_tile(sums.v, tile_v, self.config.columns_v)
        visible()
        cute.arch.barrier(barrier_id=RESULT + warpgroup, number_of_threads=THREADS)
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4 == 0:
            first = block.first_key + warpgroup * self.config.keys
            for operand, mapped, tile in (
                (operands.grad_k, maps.grad_k, tile_k), (operands.grad_v, maps.grad_v, tile_v)
            ):
                rows = block.grad_rows(operand, mapped)
                target, source = operand.sides(rows, first, tile)
                cute.copy(rows.atom, source, target)
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    def to_tile(self, acc: cute.Tensor, tile: cute.Tensor, columns: int) -> None:
        """An accumulator rounded into a shared tile."""
        rounded = cute.make_rmem_tensor(acc.layout, self.dtype)
        rounded.store(acc.load().to(self.dtype))
        mma = tiled_mma(self.dtype, columns, a_in_registers=True, b_transposed=True)
        to_shared(mma, rounded, tile, cute.arch.thread_idx()[0] % THREADS)
