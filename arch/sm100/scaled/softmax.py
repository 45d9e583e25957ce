"""The softmax role: as in FP8. Where V has factors its product wants some of P, too, which are all 1: a row's
weights are at most 2**8, and need no scale of their own.
"""

from __future__ import annotations

import struct

import cutlass.cute as cute
from cutlass import Int32

from ..forward.job import Work
from ..forward.softmax import Row
from ..fp8.softmax import QuantizedSoftmax
from ..tmem import columns, registers, store
from .config import P_COLUMNS

ONES = struct.unpack("<f", bytes([127] * 4))[0]  # four factors of 2**0, as a number of 32 bits


class BlockScaledSoftmax(QuantizedSoftmax):
    """The same scales of whole heads."""

    def row(self, work: Work, tile: Int32) -> Row:
        row = super().row(work, tile)
        if self.problem.v_group:
            self.store_ones(row, work)
        return row

    @cute.jit
    def store_ones(self, row: Row, work: Work):
        """Once: products of the tile before may still read them."""
        if work.past.tiles == 0:
            ones = registers(P_COLUMNS)
            ones.fill(ONES)
            store(ones, columns(row.tensor, self.plan.of("p", row.tile), P_COLUMNS), row.thread)
