"""The widening role: tiles of K and V of 8 bits become tiles of 16, in the order in which they are copied.

A warp takes 8 rows and 64 columns at a time, 16 neighbours a lane: 16 bytes that become twice 16. Eight
lanes, whose 16 bytes shared memory moves at once, have four neighbours each of rows r and r ^ 5: the swizzle
then puts what they read, and each half of what they write, into eight different groups of banks.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import AddressSpace, Int32, Uint8, pipeline

from ...common.job import Job, Launch, visits_of
from ...common.operand import Operand
from ...common.rules import Rules
from ...common.widen import Widening
from ...widened import WidenedProblem
from ..edge import Edge
from ..forward.job import job_of
from .config import Config

ROWS = 8  # of a tile, after which its swizzle repeats
TOGETHER = 16  # numbers of a lane
LANES = 4  # side by side in a row


class Side(NamedTuple):
    """K or V: tiles (rows, columns, slots) of 8 and of 16 bits."""

    narrow: cute.Tensor
    wide: cute.Tensor


class WidenEnds(NamedTuple):
    """narrow_k, narrow_v: of what the load role fills. k, v: edges of what is filled here."""

    narrow_k: pipeline.PipelineConsumer
    narrow_v: pipeline.PipelineConsumer
    k: Edge
    v: Edge


class Operands(NamedTuple):
    """The same tiles of 8 and of 16 bits."""

    narrow: Operand
    wide: Operand


class Widen:
    """Whole warpgroups, whose warps share out a tile's rows. k, v: operands."""

    def __init__(self, problem: WidenedProblem, config: Config, k: Operands, v: Operands):
        self.problem, self.config, self.k, self.v = problem, config, k, v
        self.widening = Widening.of(problem)

    @cute.jit
    def run(self, launch: Launch, k: Side, v: Side, ends: WidenEnds, warpgroup: Int32):
        job = job_of(self.problem, self.config, launch, cute.arch.block_idx()[0])
        if job.first_row < job.sequence.q_rows:
            self.tiles(job, k, v, ends, warpgroup)

    @cute.jit
    def tiles(self, job: Job, k: Side, v: Side, ends: WidenEnds, warpgroup: Int32):
        rules = Rules.of(self.problem, job.call, job.sequence, job.heads.first)
        visits = visits_of(self.problem, self.config, job, rules)
        if visits.any():
            mine = warpgroup * 4 + cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4
            # As products ask for them: K of a block before V of the one before it.
            filled = ends.narrow_k.wait_and_advance()
            self.tile(self.k, k, filled, ends.k, Int32(0), mine)
            for turn in cutlass.range(visits.total - 1, unroll=1):
                filled = ends.narrow_k.wait_and_advance()
                self.tile(self.k, k, filled, ends.k, turn + 1, mine)
                filled = ends.narrow_v.wait_and_advance()
                self.tile(self.v, v, filled, ends.v, turn, mine)
            filled = ends.narrow_v.wait_and_advance()
            self.tile(self.v, v, filled, ends.v, visits.total - 1, mine)

    def tile(self, operands: Operands, side: Side, filled, edge: Edge, turn: Int32, mine: Int32) -> None:
        """Tile number `turn`, which is `filled`."""
        slot, round_ = turn % self.config.wide, turn // self.config.wide
        edge.of(slot).wait_empty(round_)
        source, target = side.narrow[None, None, filled.index], side.wide[None, None, slot]
        self.rows(operands, source, target, mine)
        edge.of(slot).warp_filled()
        filled.release()  # all lanes have read: they have met

    @cute.jit
    def rows(self, operands: cutlass.Constexpr, source: cute.Tensor, target: cute.Tensor, mine: Int32):
        """This warp's rows of a tile."""
        lane = cute.arch.lane_idx()
        row, lane_column = lane // 8 ^ lane // LANES % 2 * 5, lane % LANES * TOGETHER
        columns, warps = operands.wide.columns, 4 * self.config.wideners
        for i in cutlass.range(mine, self.config.tile_n // ROWS, warps, unroll=1):
            for first in cutlass.range_constexpr(0, columns, LANES * TOGETHER):
                column = first + lane_column
                if first + LANES * TOGETHER <= columns or column < columns:
                    self.chunk(operands, source, target, i * ROWS + row, column)

    def chunk(
        self, operands: Operands, source: cute.Tensor, target: cute.Tensor, row: Int32, column: Int32
    ) -> None:
        """16 numbers of a row."""
        dtype, half = operands.wide.dtype, TOGETHER // 2
        narrow, wide = cute.make_rmem_tensor(TOGETHER, Uint8), cute.make_rmem_tensor((half, 2), dtype)
        cute.autovec_copy(place(operands.narrow, source, row, column, Uint8, TOGETHER), narrow)
        self.widening.row(narrow, wide)
        for i in range(2):
            there = place(operands.wide, target, row, column + i * half, dtype, half)
            cute.autovec_copy(wide[None, i], there)


def place(
    operand: Operand, tile: cute.Tensor, row: Int32, column: Int32, dtype: type, count: int
) -> cute.Tensor:
    """`count` numbers of a tile's row, 16 bytes, where the swizzle puts them."""
    nbytes = operand.precision.nbytes
    address = tile.iterator.toint().to(Int32) + nbytes(cute.crd2idx((row, column), tile.layout))
    swizzled = address ^ (address >> 3 & nbytes(operand.width) - 16)
    pointer = cute.make_ptr(dtype, swizzled, AddressSpace.smem, assumed_align=16)
    return cute.make_tensor(pointer, cute.make_layout(count))
