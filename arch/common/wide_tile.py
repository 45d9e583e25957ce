"""Shared tiles of 8 bits that warps widen to 16, as TMA has filled the ones and products read the others.

A warp takes 8 rows and 64 columns at a time, 16 neighbours a lane: 16 bytes that become twice 16. Eight
lanes, whose 16 bytes shared memory moves at once, have four neighbours each of rows r and r ^ 5: the swizzle
then puts what they read, and each half of what they write, into eight different groups of banks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import AddressSpace, Int32

from .operand import Operand
from .topology import Barriers
from .widen import convert

ROWS = 8  # of a tile, after which its swizzle repeats
TOGETHER = 16  # numbers of a lane
LANES = 4  # side by side in a row


class WideEnd(NamedTuple):
    """Who fills slots of 16 bits: barriers of the first of them in shared memory, 8 bytes each."""

    full: cute.Pointer
    empty: cute.Pointer
    slots: int

    @staticmethod
    def at(base: cute.Pointer, barriers: Barriers) -> WideEnd:
        """A link's. base: the CTA's barriers."""
        full = base + barriers.first
        return WideEnd(full, full + barriers.slots, barriers.slots)

    def wait(self, turn: Int32) -> Int32:
        """The slot of filling number `turn`, when that may begin."""
        slot = turn % self.slots
        cute.arch.mbarrier_wait(self.empty + slot, (turn // self.slots & 1) ^ 1)
        return slot

    def warp_filled(self, slot: Int32) -> None:
        """This warp has done its share, for products to read."""
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(self.full + slot)


class Side(NamedTuple):
    """K or V: tiles (rows, columns, slots) of 8 and of 16 bits, and who fills these."""

    narrow: cute.Tensor
    wide: cute.Tensor
    end: WideEnd


@dataclass(frozen=True)
class TileWidening:
    """narrow, wide: the same tiles as operands. warps: that share out a tile's rows."""

    narrow: Operand
    wide: Operand
    warps: int

    def tile(self, side: Side, filled, turn: Int32, mine: Int32) -> None:
        """Tile number `turn`, which is `filled`; `mine`: which of the warps this is."""
        slot = side.end.wait(turn)
        self.rows(side.narrow[None, None, filled.index], side.wide[None, None, slot], mine)
        side.end.warp_filled(slot)
        filled.release()  # all lanes have read: they have met

    @cute.jit
    def rows(self, source: cute.Tensor, target: cute.Tensor, mine: Int32):
        """This warp's rows of a tile."""
        lane = cute.arch.lane_idx()
        row, lane_column = lane // 8 ^ lane // LANES % 2 * 5, lane % LANES * TOGETHER
        columns, together = self.wide.columns, LANES * TOGETHER
        for i in cutlass.range(mine, self.wide.rows // ROWS, self.warps, unroll=1):
            for first in cutlass.range_constexpr(0, columns, together):
                column = first + lane_column
                if first + together <= columns or column < columns:
                    self.chunk(source, target, i * ROWS + row, column)

    def chunk(self, source: cute.Tensor, target: cute.Tensor, row: Int32, column: Int32) -> None:
        """16 numbers of a row."""
        half = TOGETHER // 2
        narrow = cute.make_rmem_tensor(TOGETHER, self.narrow.dtype)
        wide = cute.make_rmem_tensor(TOGETHER, self.wide.dtype)
        cute.autovec_copy(place(self.narrow, source, row, column, TOGETHER), narrow)
        convert(narrow, wide)
        for first in (0, half):
            part = cute.make_tensor(wide.iterator + first, cute.make_layout(half))
            cute.autovec_copy(part, place(self.wide, target, row, column + first, half))


def place(operand: Operand, tile: cute.Tensor, row: Int32, column: Int32, count: int) -> cute.Tensor:
    """`count` numbers of a tile's row, 16 bytes, where the swizzle puts them."""
    nbytes = operand.precision.nbytes
    address = tile.iterator.toint().to(Int32) + nbytes(cute.crd2idx((row, column), tile.layout))
    swizzled = address ^ (address >> 3 & nbytes(operand.width) - 16)
    pointer = cute.make_ptr(operand.dtype, swizzled, AddressSpace.smem, assumed_align=16)
    return cute.make_tensor(pointer, cute.make_layout(count))
