"""K and V of 8 bits on their way to tiles of 16: cp.async, then through the registers of who copied.

A thread widens the chunks that it copied itself, so that no other barrier is needed than the one that shows a
tile to all warps. There is one tile of 16 bits of each kind: when K is waited for all warps are done with the
K before, as of the barrier that showed the V after it, and so with V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import AddressSpace, Int32, Uint8

from ...common.order import hidden_zero
from ...common.widen import Widening
from ..copy import CHUNK, TileCopy, tile_width
from ..kv import KvLoader, KvStream
from ..rows import Rows


class NarrowSource(NamedTuple):
    """K or V. tiles: those of 8 bits; wide: the one of 16, (rows, dim, 1)."""

    rows: Rows
    tiles: cute.Pointer
    wide: cute.Tensor


@dataclass(frozen=True)
class NarrowCopy(TileCopy):
    """As a TileCopy of bytes whose tiles lie as threads copy them, neighbours side by side.

    widening: from 8 bits to `wide`.
    """

    widening: Widening | None = None
    wide: type | None = None

    def place(self, tiles: cute.Pointer, thread: Int32, stage: Int32) -> cute.Tensor:
        """A thread's chunks of one of the tiles of 8 bits: (chunk, row steps, column steps)."""
        steps = (-(-self.rows // self.row_step), self.padded // (self.lanes * self.chunk))
        strides = (self.threads * self.chunk, self.rows * self.lanes * self.chunk)
        layout = cute.make_layout((self.chunk, *steps), stride=(1, *strides))
        first = thread * self.chunk + stage * (self.rows * self.padded)
        return cute.make_tensor(tiles + cute.assume(first, divby=self.chunk), layout)

    def wide_place(self, tile: cute.Tensor, thread: Int32) -> Int32:
        """Address of a thread's first eight numbers in a tile (rows, dim, 1) of 16 bits."""
        row, lane = thread // self.lanes % self.rows, thread % self.lanes
        return cute.local_tile(tile[row, None, 0], (CHUNK,), (2 * lane,)).iterator.toint().to(Int32)

    @cute.jit
    def widen(self, chunks: cute.Tensor, wide: Int32, thread: Int32):
        """A thread's chunks of one tile, which have come, to their places in the tile of 16 bits.

        Steps of rows are whole turns of the swizzle, and those of columns a part of the tile, so that places
        are all as far from the first as without it; the second half of a chunk has one address bit flipped.
        A loop, so that compilers do not begin all chunks at once, for which there are no registers.
        """
        rows, columns = cute.size(chunks, mode=[1]), cute.size(chunks, mode=[2])
        size = tile_width(self.padded) * self.wide.width // 8  # of a row in a part
        for j in cutlass.range(columns, unroll=1):
            for i in cutlass.range_constexpr(rows):
                if self._row_inside(thread, i):
                    place = wide + (i * self.row_step + j * self.rows) * size
                    self.chunk_of(chunks[None, i, j], place)

    def chunk_of(self, narrow: cute.Tensor, wide: Int32) -> None:
        """Sixteen numbers to a place and the one beside it."""
        numbers = cute.make_rmem_tensor(self.chunk, Uint8), cute.make_rmem_tensor((CHUNK, 2), self.wide)
        cute.autovec_copy(narrow, numbers[0])
        self.widening.row(*numbers)
        for half in range(2):
            target = cute.make_ptr(self.wide, wide ^ half * 16, AddressSpace.smem, assumed_align=16)
            cute.autovec_copy(numbers[1][None, half], cute.make_tensor(target, cute.make_layout(CHUNK)))


class NarrowLoader(KvLoader):
    """As `KvLoader`, of tiles of 8 bits that are widened when they are waited for."""

    def clear_padding(self, stream: KvStream) -> None:
        """There are no such columns: head dims are of whole chunks of 16."""

    def slot(self, place: Int32) -> Int32:
        """There is one tile of 16 bits."""
        return hidden_zero(place)

    def wait_k(self, stream: KvStream, place: Int32) -> None:
        """K of the visit at a place is complete and visible to all warps; they are done with the V before."""
        self._wait(stream, stream.k, self.copy_k, place)

    def wait_v(self, stream: KvStream, place: Int32) -> None:
        """V of the visit at a place is complete and visible to all warps; they are done with the K before."""
        self._wait(stream, stream.v, self.copy_v, place)

    def _wait(self, stream: KvStream, source: NarrowSource, copy: NarrowCopy, place: Int32) -> None:
        cute.arch.cp_async_wait_group(2 * (self.stages - 1))
        thread = found_here(stream, place)
        copy.widen(self.chunks(stream, source, copy, place), copy.wide_place(source.wide, thread), thread)
        cute.arch.barrier()

    def chunks(self, stream: KvStream, source: NarrowSource, copy: NarrowCopy, place: Int32) -> cute.Tensor:
        """This thread's chunks of the tile that a visit's block is copied to."""
        return copy.place(source.tiles, found_here(stream, place), self.stage(place))


def found_here(stream: KvStream, place: Int32) -> Int32:
    """The thread, so that its addresses are computed where they are used: O needs the registers."""
    return stream.thread + hidden_zero(place)
