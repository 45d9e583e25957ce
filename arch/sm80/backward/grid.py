"""Warps of a CTA side by side and below each other on a tile, and what each holds of it.

A product's result (rows, columns) lies in registers as mma.sync leaves it, ((2, 2), M, N) a thread: of every
16 rows that a warp has, a lane has rows lane // 4 and 8 more; of every 8 columns, two neighbours. A warp's
pieces of 16 rows are `rows` pieces apart. Its pieces of 16 columns are neighbours in a `joined` grid, else
`columns` pieces apart: in shared tiles a step to the right flips address bits, so that what a warp adds may
share none with where it begins.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import AddressSpace, Float32, Int32

from ..copy import CHUNK, tile_width
from ..mma import PIECE, Pieces


class HeldPieces(NamedTuple):
    """Pieces of B that stay in registers.

    pieces: where they come from. registers: (n, k) -> B's (mma, 2) for columns 16 n and on, k step `k`.
    """

    pieces: Pieces
    registers: dict[tuple[int, int], cute.Tensor]

    def load(self) -> None:
        """Fill the registers."""
        for at, registers in self.registers.items():
            registers.store(self.pieces.operand_b(*at).load())

    def operand_b(self, n: int, k: int) -> cute.Tensor:
        """What `Pieces.operand_b` reads each time."""
        return self.registers[n, k]


class Grid(NamedTuple):
    """rows × columns warps on a tile (tile_rows, tile_columns), seen by one thread."""

    rows: int
    columns: int
    tile_rows: int
    tile_columns: int
    thread: Int32
    joined: bool = False

    def of(self, thread: Int32) -> Grid:
        """The same, seen by `thread`."""
        return self._replace(thread=thread)

    @property
    def row(self) -> Int32:
        """The warp's."""
        return self.thread // 32 // self.columns

    @property
    def column(self) -> Int32:
        """The warp's."""
        return self.thread // 32 % self.columns

    @property
    def row_pieces(self) -> int:
        """Pieces of 16 rows that a warp has."""
        return self.tile_rows // (PIECE * self.rows)

    @property
    def column_pieces(self) -> int:
        """Pieces of 16 columns that a warp has."""
        return self.tile_columns // (PIECE * self.columns)

    @property
    def first_piece(self) -> Int32:
        """The warp's first piece of columns."""
        return self.column * self.column_pieces if self.joined else self.column

    @property
    def first_column(self) -> Int32:
        """The warp's first column of the tile."""
        return self.first_piece * PIECE

    @property
    def apart(self) -> int:
        """From one of a warp's pieces of columns to the next."""
        return 1 if self.joined else self.columns

    def accumulator(self) -> cute.Tensor:
        """fp32 zeros (mma, M, N)."""
        acc = cute.make_rmem_tensor(((2, 2), self.row_pieces, 2 * self.column_pieces), Float32)
        acc.fill(0.0)
        return acc

    def row_of(self, r: int) -> Int32:
        """In the tile: row r of an accumulator's rows × columns."""
        piece = r // 2 * self.rows + self.row
        return piece * PIECE + r % 2 * 8 + self.thread % 32 // 4

    def column_of(self, c: int) -> Int32:
        """In the tile: column c of an accumulator's rows × columns."""
        piece = c // 4 * self.apart + self.first_piece
        return piece * PIECE + c // 2 % 2 * 8 + self.thread % 4 * 2 + c % 2

    def by_row(self, numbers: cute.Tensor, slot: Int32) -> list[Float32]:
        """Of shared (rows, stages): the number of each row that a thread has."""
        return [numbers[self.row_of(r), slot] for r in range(2 * self.row_pieces)]

    def a(self, tile: cute.Tensor) -> Pieces:
        """A shared tile as A, (rows, k)."""
        return Pieces.of(tile, self.row * PIECE + self.thread % 16, self.thread // 16 % 2, False)

    def a_transposed(self, tile: cute.Tensor) -> Pieces:
        """A shared tile as A, stored (k, rows)."""
        k = self.thread // 16 % 2 * 8 + self.thread % 8
        return Pieces.of(tile, k, self.row * 2 + self.thread // 8 % 2, True)

    def b(self, tile: cute.Tensor) -> Pieces:
        """A shared tile as B, stored (columns, k)."""
        column = self.first_piece * PIECE + self.thread // 16 % 2 * 8 + self.thread % 8
        return Pieces.of(tile, column, self.thread // 8 % 2, False, self.apart)

    def b_transposed(self, tile: cute.Tensor) -> Pieces:
        """A shared tile as B, stored (k, columns)."""
        chunk = self.first_piece * 2 + self.thread // 16 % 2
        return Pieces.of(tile, self.thread % 16, chunk, True, self.apart)

    def hold_b(self, pieces: Pieces) -> HeldPieces:
        """Room for all of a shared tile, B stored (columns, k), that a warp needs."""
        pairs = itertools.product(range(self.column_pieces), range(pieces.dim // PIECE))
        return HeldPieces(pieces, {at: cute.make_rmem_tensor(((2, 2), 2), pieces.dtype) for at in pairs})

    def load_a(self, pieces: Pieces) -> Callable:
        """k -> A's registers for that k step."""
        registers = cute.make_rmem_tensor(((2, 2, 2), self.row_pieces), pieces.dtype)
        return lambda k: pieces.operand_a(k, registers, self.rows)

    def store(self, acc: cute.Tensor, tile: cute.Tensor) -> None:
        """A rounded accumulator into a shared tile (rows, columns, 1), two neighbours at a time.

        The 8 rows of a warp's store lie in 8 groups of banks: without conflicts.
        """
        dtype, width = tile.element_type, tile_width(self.tile_columns)
        size = dtype.width // 8
        row = self.row * PIECE + self.thread % 32 // 4
        mine = cute.local_tile(tile[row, None, 0], (CHUNK,), (self.first_piece * 2,))
        # The lane's two columns are inside the chunk, which no swizzle touches.
        address = mine.iterator.toint().to(Int32) + self.thread % 4 * (2 * size)
        for n in range(cute.size(acc, mode=[2])):
            block, inside = divmod(PIECE * (n // 2) * self.apart, width)
            at = (address ^ ((inside + n % 2 * CHUNK) * size)) + block * self.tile_rows * width * size
            for m in range(self.row_pieces):
                for i in range(2):
                    down = (m * self.rows * PIECE + i * 8) * width * size
                    target = cute.make_ptr(dtype, at + down, AddressSpace.smem, assumed_align=2 * size)
                    pair = cute.make_rmem_tensor(2, dtype)
                    pair[0], pair[1] = acc[(0, i), m, n], acc[(1, i), m, n]
                    cute.autovec_copy(pair, cute.make_tensor(target, cute.make_layout(2)))
