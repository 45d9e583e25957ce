"""The transposing role: tiles of V, keys x columns, become columns x keys, as FP8 products want them.

    ldmatrix.trans  16-bit words of two columns: of 32 keys and 16 columns a lane gets, of keys 8i + 2t and
                    8i + 2t + 1, columns 2g and 2g + 1 (g = lane / 4, t = lane % 4)
    prmt            bytes of one column: keys 16h + 2t, + 1, 16h + 8 + 2t, + 1, which is the order of `mma.py`
    stmatrix        16 keys of a column are a row of 16 bytes

The rows that one stmatrix writes are columns 0, 2, 4, 6, 9, 11, 13, 15 of 16, or the others: the swizzle puts
eight that differ in their last three bits into eight different groups of banks.

A warp takes all keys of 16 columns. 32 keys of V are whole periods of the swizzle, and so are 16 columns of
the transposed tile: a lane has one address on either side, and what is added to it or flipped is known.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32, pipeline

from ...common.job import Job, Launch, visits_of
from ...common.operand import Operand
from ...common.rules import Rules
from ...elementwise import where
from ...quantized import QuantizedProblem
from ..edge import Edge
from ..forward.job import job_of
from .compute import AllTiles
from .config import TRANSPOSED, Config
from .matrices import address, read, swizzled, write
from .mma import KEYS
from .topology import TRANSPOSERS

COLUMNS = 16  # that a warp takes at a time
EVEN, ODD = 0x6420, 0x7531  # bytes 0, 2 and 1, 3 of two words


class TransposeEnds(NamedTuple):
    v: pipeline.PipelineConsumer
    transposed: Edge


class Transpose:
    """Three warps, which share out a tile's columns. v, transposed: the operands."""

    def __init__(self, problem: QuantizedProblem, config: Config, v: Operand, transposed: Operand):
        self.problem, self.config = problem, config
        self.v, self.transposed = v, transposed

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
            lane = Lane.of(self.v, self.transposed)
            for turn in cutlass.range(visits.total, unroll=1):
                slot = turn % TRANSPOSED
                filled = ends.v.wait_and_advance()
                ends.transposed.of(slot).wait_empty(turn // TRANSPOSED)
                source, target = tiles.tiles.v[None, None, filled.index], tiles.transposed[None, None, slot]
                pieces = self.v.columns // COLUMNS
                for piece in cutlass.range(mine, pieces, TRANSPOSERS, unroll=1):
                    self.columns(source, target, lane, piece)
                ends.transposed.of(slot).warp_filled()
                filled.release()  # all lanes have read: they have met

    def columns(self, source: cute.Tensor, target: cute.Tensor, lane: Lane, piece: Int32) -> None:
        """16 columns of all keys of a tile, to the transposed one."""
        columns = Uint32(piece * COLUMNS)  # never negative
        source_part = address(source) + columns // self.v.width * (self.v.width * self.v.rows)
        rows, places = lane.source ^ columns % self.v.width, address(target) + columns * self.transposed.width
        for key in range(0, self.v.rows, KEYS):
            words, ordered = (cute.make_rmem_tensor(4, Int32) for _ in range(2))
            read(source_part + key * self.v.width + rows, words, transposed=True)
            for h in range(2):
                for m in range(2):
                    ordered[2 * h + m] = Int32(cute.arch.prmt(words[2 * h], words[2 * h + 1], lane.chosen[m]))
            part, inside = divmod(key, self.transposed.width)
            place = places + part * (self.transposed.width * self.transposed.rows)
            write(ordered, (lane.target ^ inside) + place)


class Lane(NamedTuple):
    """What is a lane's for all pieces of all tiles.

    source: its row of 16 bytes of the first piece of V, from the beginning of a tile. target: its row of the
    first piece of the transposed tile. chosen: bytes of two words, for either of two matrices.
    """

    source: Int32
    target: Int32
    chosen: tuple[Int32, Int32]

    @staticmethod
    def of(v: Operand, transposed: Operand) -> Lane:
        lane = cute.arch.lane_idx()
        matrix, row = lane // 8, lane % 8
        odd, crossed = where(row < 4, matrix % 2, 1 - matrix % 2), lane >= 16
        return Lane(
            source=swizzled(v, lane * v.width),
            target=swizzled(transposed, (2 * row + odd) * transposed.width + matrix // 2 * 16),
            chosen=(where(crossed, ODD, EVEN), where(crossed, EVEN, ODD)),
        )
