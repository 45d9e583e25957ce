"""Tiles between global and shared memory: cp.async in, 16-byte stores out, swizzled in between.

Shared tiles are (rows, dim, stages), the dim padded to whole mma steps. The swizzle XORs the index of
a 16-byte chunk with the row's low bits, so that the 8 rows that ldmatrix reads at once lie in 8
different groups of banks, whatever the dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, and_, const_expr, not_
from cutlass.cute.nvgpu import CopyUniversalOp, LoadCacheMode, cpasync

from .rows import LookedUp, Rows, Shared, beyond

CHUNK = 8  # elements in 16 bytes


def tile_width(dim: int) -> int:
    """Columns that lie side by side in a shared tile; the next ones follow after all rows."""
    return next(width for width in (64, 32, 16) if dim % width == 0)


def tile_layout(rows: int, dim: int, stages: int) -> cute.ComposedLayout:
    """(rows, dim, stages), swizzled in elements."""
    width = tile_width(dim)
    swizzle = cute.make_swizzle({64: 3, 32: 2, 16: 1}[width], 3, 3)
    atom = cute.make_composed_layout(swizzle, 0, cute.make_layout((8, width), stride=(width, 1)))
    tile = cute.tile_to_shape(atom, (rows, dim), (0, 1))
    staged = cute.append(tile.outer, cute.make_layout(stages, stride=rows * dim))
    return cute.make_composed_layout(tile.inner, 0, staged)


@dataclass(frozen=True)
class TileCopy:
    """How a CTA's threads share out a tile of rows × dim: neighbours take the chunks of one row.

    heads: that share a tile's rows, where the global ones are `Shared`. Columns from dim to padded exist in
    shared memory only: `clear_padding` zeroes them once.
    """

    dtype: type
    rows: int
    dim: int
    padded: int
    threads: int
    heads: int = 1

    @property
    def chunk(self) -> int:
        """Elements in 16 bytes."""
        return 128 // self.dtype.width

    @property
    def lanes(self) -> int:
        """Threads side by side in a row."""
        return tile_width(self.padded) // self.chunk

    @property
    def row_step(self) -> int:
        """Rows that all threads together cover at once; may exceed `rows`."""
        return self.threads // self.lanes

    def partition(self, tile: cute.Tensor, thread: Int32) -> cute.Tensor:
        """A thread's chunks of a shared tile: (chunk, row steps, column steps, stages)."""
        threads = cute.make_layout((self.row_step, self.lanes), stride=(self.lanes, 1))
        values = cute.make_layout((1, self.chunk))
        tiled = cute.make_tiled_copy_tv(self._atom(CopyUniversalOp()), threads, values)
        return tiled.get_slice(thread).partition_D(tile)

    @cute.jit
    def load(self, rows: Rows, chunks: cute.Tensor, thread: Int32, last_row: Int32 | None):
        """Begin copying global rows into a thread's `chunks` of one shared tile.

        last_row: row that is read in place of all beyond it, so that nothing outside is touched and no
        part of the tile stays unwritten; None where the tile lies inside.
        """
        atom = self._atom(cpasync.CopyG2SOp(cache_mode=LoadCacheMode.GLOBAL))
        first = thread // self.lanes
        mine = self._found(beyond(rows, first))
        for i, j in self._steps():
            row = i * self.row_step
            if const_expr(last_row is not None):
                row = cutlass.min(Int32(row), last_row - first)
            if self._inside(thread, i, j):
                source = mine[i] if isinstance(mine, list) else mine[row, None]
                cute.copy(atom, self._chunk(source, thread, j), chunks[None, i, j])

    @cute.jit
    def store(self, chunks: cute.Tensor, rows: Rows, thread: Int32, end_row: Int32):
        """Copy a thread's `chunks` of one shared tile to global rows before `end_row`, or that exist."""
        atom = self._atom(CopyUniversalOp())
        first = thread // self.lanes
        mine = beyond(rows, first)
        for i, j in self._steps():
            row = i * self.row_step
            if const_expr(isinstance(mine, Shared)):
                if and_(self._inside(thread, i, j), mine.exists(row, self.heads)):
                    target = self._chunk(mine.row(row, self.heads), thread, j)
                    cute.copy(atom, chunks[None, i, j], target)
            elif and_(self._inside(thread, i, j), first + row < end_row):
                target = self._chunk(mine[row, None], thread, j)
                cute.copy(atom, chunks[None, i, j], target)

    @cute.jit
    def clear_padding(self, chunks: cute.Tensor, thread: Int32):
        """Zero the chunks that no copy writes, in all stages."""
        for i, j in self._steps():
            if and_(self._row_inside(thread, i), not_(self._column_inside(thread, j))):
                chunks[None, i, j, None].fill(0.0)

    def _steps(self) -> list[tuple[int, int]]:
        """(row step, column step) of every chunk."""
        columns = self.padded // (self.lanes * self.chunk)
        return [(i, j) for i in range(-(-self.rows // self.row_step)) for j in range(columns)]

    def _found(self, rows: Rows) -> cute.Tensor | list[cute.Tensor]:
        """Of rows to look up, (dim,) of every row step: all are found before the first is copied."""
        if not isinstance(rows, LookedUp):
            return rows
        steps = range(-(-self.rows // self.row_step))
        return [rows.row(i * self.row_step, self.heads) for i in steps]

    def _inside(self, thread: Int32, i: int, j: int):
        return and_(self._row_inside(thread, i), self._column_inside(thread, j))

    def _row_inside(self, thread: Int32, i: int):
        """Whether row step i of a thread is part of the tile; a constant where it is for all."""
        return (i + 1) * self.row_step <= self.rows or thread // self.lanes + i * self.row_step < self.rows

    def _column_inside(self, thread: Int32, j: int):
        """Whether column step j of a thread is part of the head dim; a constant where it is for all."""
        everyone = (j + 1) * self.lanes * self.chunk <= self.dim
        return everyone or (thread % self.lanes + j * self.lanes) * self.chunk < self.dim

    def _chunk(self, row: cute.Tensor, thread: Int32, j: int) -> cute.Tensor:
        return cute.local_tile(row, (self.chunk,), (thread % self.lanes + j * self.lanes,))

    def _atom(self, op) -> cute.CopyAtom:
        return cute.make_copy_atom(op, self.dtype, num_bits_per_copy=128)
