"""The transposing role: tiles of V, keys x columns, become columns x keys, as FP8 products want them.

    ldmatrix.trans  16-bit words of two columns: of 32 keys and 16 columns a lane gets, of keys 8i + 2t and
                    8i + 2t + 1, columns 2g and 2g + 1 (g = lane / 4, t = lane % 4)
    prmt            bytes of one column: keys 16h + 2t, + 1, 16h + 8 + 2t, + 1, which is the order of `mma.py`
    stmatrix        16 keys of a column are a row of 16 bytes

The rows that one stmatrix writes are columns 0, 2, 4, 6, 9, 11, 13, 15 of 16, or the others: the swizzle puts
eight that differ in their last three bits into eight different groups of banks.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import AddressSpace, Float16, Int32, pipeline
from cutlass.cute.nvgpu import warp

from ...common.job import Job, Launch, visits_of
from ...common.operand import Operand
from ...common.rules import Rules
from ...elementwise import where
from ...quantized import QuantizedProblem
from ..edge import Edge
from ..forward.job import job_of
from .compute import AllTiles
from .config import TRANSPOSED, Config
from .mma import KEYS
from .topology import TRANSPOSERS

COLUMNS = 16  # that a warp takes at a time
EVEN, ODD = 0x6420, 0x7531  # bytes 0, 2 and 1, 3 of two words


class TransposeEnds(NamedTuple):
    v: pipeline.PipelineConsumer
    transposed: Edge


class Transpose:
    """Three warps, which share out a tile's pieces. v, transposed: the operands."""

    def __init__(self, problem: QuantizedProblem, config: Config, v: Operand, transposed: Operand):
        self.problem, self.config = problem, config
        self.v, self.transposed = v, transposed
        self.pieces = (problem.precision.padded(problem.head_dim_v) // COLUMNS, config.tile_n // KEYS)

    @cute.jit
    def run(self, launch: Launch, tiles: AllTiles, ends: TransposeEnds):
        mine = cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4 - 1
        if mine >= 0:
            job = job_of(self.problem, self.config, launch, cute.arch.block_idx()[0])
            if job.first_row < job.sequence.q_rows:
                self.tiles(job, tiles, ends, mine)

    @cute.jit
    def tiles(self, job: Job, tiles: AllTiles, ends: TransposeEnds, mine: Int32):
        rules = Rules.of(self.problem, job.call, job.sequence, job.heads.first)
        visits = visits_of(self.problem, self.config, job, rules)
        if visits.any():
            for turn in cutlass.range(visits.total, unroll=1):
                slot = turn % TRANSPOSED
                filled = ends.v.wait_and_advance()
                ends.transposed.of(slot).wait_empty(turn // TRANSPOSED)
                source, target = tiles.tiles.v[None, None, filled.index], tiles.transposed[None, None, slot]
                columns, keys = self.pieces
                for piece in cutlass.range(mine, columns * keys, TRANSPOSERS, unroll=1):
                    self.piece(source, target, piece // keys, piece % keys)
                ends.transposed.of(slot).warp_filled()
                filled.release()  # all lanes have read: they have met

    @cute.jit
    def piece(self, source: cute.Tensor, target: cute.Tensor, column: Int32, key: Int32):
        """16 columns of 32 keys."""
        lane = cute.arch.lane_idx()
        matrix, row = lane // 8, lane % 8
        words, ordered = (cute.make_rmem_tensor(4, Int32) for _ in range(2))
        rows = self.place(self.v, source, key * KEYS + lane, column * COLUMNS)
        _copy(warp.LdMatrix8x8x16bOp(True, 4), rows, words.iterator)
        crossed = lane >= 16
        chosen = where(crossed, ODD, EVEN), where(crossed, EVEN, ODD)
        for h in cutlass.range_constexpr(2):
            for m in cutlass.range_constexpr(2):
                ordered[2 * h + m] = Int32(cute.arch.prmt(words[2 * h], words[2 * h + 1], chosen[m]))
        odd = where(row < 4, matrix % 2, 1 - matrix % 2)
        columns = self.place(
            self.transposed, target, column * COLUMNS + 2 * row + odd, key * KEYS + matrix // 2 * 16
        )
        _copy(warp.StMatrix8x8x16bOp(False, 4), ordered.iterator, columns)

    def place(self, operand: Operand, tile: cute.Tensor, row: Int32, column: Int32) -> cute.Pointer:
        """16 bytes of a tile's row, where the swizzle puts them."""
        address = tile.iterator.toint().to(Int32) + cute.crd2idx((row, column), tile.layout)
        swizzled = address ^ (address >> 3 & operand.width - 16)
        return cute.make_ptr(Float16, swizzled, AddressSpace.smem, assumed_align=16)


def _copy(op, source: cute.Pointer, target: cute.Pointer) -> None:
    """16 bytes, or four words, as eight 16-bit numbers."""
    layout = cute.make_layout(((8, 1),))
    sides = (cute.make_tensor(cute.recast_ptr(side, dtype=Float16), layout) for side in (source, target))
    cute.copy(cute.make_copy_atom(op, Float16), *sides)
