"""The softmax role: one warpgroup, two threads to a row, which have half of a block's keys each.

    wait S   load S   rules   maximum <-> the other half's -> factor to the correction
    P = exp2(S - max) -> shared memory, when P of the block before has been read   sum P
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from ...common.output import OutputRows
from ..backward.store import to_row
from ..config import TILE_M
from ..edge import Edge
from ..forward.job import Work
from ..forward.softmax import Row, Softmax
from .job import other, part_of, row_of

SHARED = 1  # named barrier: of the warpgroup, whose threads tell each other


class LatentSoftmax(Softmax):
    """The same rules, exponentials and sums, of half a row."""

    def __init__(self, *made):
        super().__init__(*made)
        self.width = self.plan.tile_n

    def row(self, work: Work, tile: Int32) -> Row:
        row = super().row(work, tile)
        return row._replace(p=work.memory.p[row_of(row.thread), None, 0])

    def first_key(self, row: Row, n: Int32) -> Int32:
        return super().first_key(row, n) + part_of(row.thread) * self.width

    def of_row(self, row: Row, work: Work, turn: Int32, most: Float32) -> Float32:
        """The other half's besides."""
        told = work.memory.maxima[None, turn % 2]
        told[row.thread] = most
        self.meet()
        return cute.arch.fmax(most, told[other(row.thread)])

    def wait_for_room(self, work: Work, turn: Int32) -> None:
        """Until P V of the block before is complete."""
        # One that is not there is complete: its turn's phase is the one before the first.
        work.edges.o.wait_full(turn + 1)

    def put(self, row: Row, words: cute.Tensor, column: Int32) -> None:
        p = cute.recast_tensor(words, self.dtype)
        to_row(p, row.p, part_of(row.thread) * self.width + column * self.packed)

    def told(self, columns: int, s: Edge, tail: Edge | None) -> None:
        """All of P is stored."""
        if columns == self.width:
            cute.arch.fence_proxy("async.shared", space="cta")
            s.warp_emptied(self.group)

    def finish(self, row: Row, work: Work) -> None:
        """With the sum of both halves."""
        told = work.memory.maxima[None, 0]
        self.meet()
        told[row.thread] = row.softmax.row_sum[0]
        self.meet()
        row.softmax.row_sum[0] = row.softmax.row_sum[0] + told[other(row.thread)]
        super().finish(row, work)

    def normaliser(self, row: Row, rows: OutputRows, exists: Boolean) -> Float32:
        """One of the two writes the log-sum-exp."""
        return super().normaliser(row, rows, exists & (part_of(row.thread) == 0))

    def meet(self) -> None:
        """All threads of the role."""
        cute.arch.barrier(barrier_id=SHARED, number_of_threads=TILE_M)
