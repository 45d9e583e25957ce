"""Operands that TMA moves: a swizzled shared tile, and a head's rows in global memory, declared once.

A tile is (rows, dim) with dim in whole k steps of matrix instructions, swizzled over as wide a part of the
row as divides it. TMA fills with zeros what lies outside the tensor, so padding columns and rows past the end
need no clearing; stores leave out what lies outside.

A tensor's own bound ends the rows of a dense sequence. Where sequences end inside the tensor (packed, or
partly used) row r of a sequence is given two coordinates (i, j) at address `base + (i + j - rows) * stride`,
with i bounded by the tile's height: choosing i = rows - (what is left of the sequence) puts the bound where
the sequence ends. So nothing of the next sequence is ever read or written.

Keys may lie in pages of one size: a tile is then filled by several copies, each of rows of one page, inside
which a sequence ends as inside a tensor. So rows of a page beyond the keys in use are zeros, whatever lies
there.

A tile may hold several query heads that share a KV head: row i is then row i // heads of head i % heads. TMA
takes them as one more dimension, which ends with the group: rows of heads beyond are zeros, and not written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32, Uint32
from cutlass.cute.nvgpu import cpasync

from ..elementwise import maximum, minimum
from ..precision import Precision
from .element import element_type

LOOKED_UP = 4  # pages at a time: as registers of a role that copies allow


class Mapped(NamedTuple):
    """A tensor as TMA sees it: (rows, dim, heads, batch), or (rows of a copy, dim, start, heads[, batch]).

    With several heads in a tile: the heads of a group come first, and `heads` counts groups.
    """

    atom: cute.CopyAtom
    coordinates: cute.Tensor


class HeadRows(NamedTuple):
    """One head's or group's rows of one sequence: start <= r < end of `coordinates`.

    coordinates: ([heads of the group,] rows, dim), or with `start` after dim; (rows, dim, start, pages) where
    they lie in pages, `table` (pages,) says in which.
    """

    atom: cute.CopyAtom
    coordinates: cute.Tensor
    start: Int32
    end: Int32
    table: cute.Tensor | None = None


@dataclass(frozen=True)
class Operand:
    """A tile of `rows` rows, `stages` of them in shared memory, `pitch` elements apart.

    dim: columns in global memory, padded in shared memory. ragged: sequences end inside the tensor.
    heads: in one tile, a divisor of `rows`. parts: of the columns, of which a tile holds one. pieces: equal
    ones of a tile's columns, that products take apart: no swizzled part is in two. page_size: rows of a page,
    a multiple of 8, where global memory consists of pages.
    """

    precision: Precision
    rows: int
    dim: int
    stages: int
    ragged: bool
    pitch: int
    heads: int = 1
    parts: int = 1
    pieces: int = 1
    page_size: int | None = None

    @staticmethod
    def of(
        precision: Precision, rows: int, dim: int, stages: int, ragged: bool, pitch: int = 0
    ) -> Operand:
        """An operand whose tiles are `pitch` elements apart, at least their size."""
        return Operand(precision, rows, dim, stages, ragged, max(pitch, rows * precision.padded(dim)))

    def packed(self, heads: int) -> Operand:
        """The same with the rows of `heads` heads in a tile, instead of as many more rows of one."""
        return replace(self, heads=heads)

    def in_parts(self, parts: int) -> Operand:
        """The same with one of `parts` equal parts of the columns in a tile."""
        columns = self.precision.padded(self.dim, parts) // parts
        return replace(self, parts=parts, pitch=self.rows * columns)

    def in_pages(self, page_size: int | None) -> Operand:
        """The same with rows that lie in pages; None: they do not."""
        return replace(self, page_size=page_size)

    def in_pieces(self, pieces: int) -> Operand:
        """The same with columns that products take in so many equal pieces."""
        return replace(self, pieces=pieces)

    @property
    def dtype(self) -> type:
        """Of its elements, as the compiler has it."""
        return element_type(self.precision)

    @property
    def columns(self) -> int:
        """Columns of a tile."""
        return self.precision.padded(self.dim, self.parts) // self.parts

    @property
    def sequence_rows(self) -> int:
        """Rows of a sequence in a tile."""
        return self.rows // self.heads

    @property
    def bytes(self) -> int:
        """What one tile's copy transfers, zeros included."""
        return self.precision.nbytes(self.rows * self.columns)

    @property
    def width(self) -> int:
        """Columns of a swizzled part."""
        return self.precision.swizzle_width(self.columns // self.pieces)

    def layout(self) -> cute.ComposedLayout:
        """(rows, dim, stages): a layout, and the swizzle of its bytes."""
        bits = {128: 3, 64: 2, 32: 1}[self.precision.nbytes(self.width)]
        atom = cute.make_layout((8, self.width), stride=(self.width, 1))
        tile = cute.tile_to_shape(atom, (self.rows, self.columns), (0, 1))
        staged = cute.append(tile, cute.make_layout(self.stages, stride=self.pitch))
        return cute.make_composed_layout(cute.make_swizzle(bits, 4, 3), 0, staged)

    @property
    def copy_rows(self) -> int:
        """Rows of a sequence that one copy moves: of a tile and of a page a whole part."""
        return gcd(self.sequence_rows, self.page_size) if self.page_size else self.sequence_rows

    @property
    def box(self) -> tuple[int, ...]:
        """What one copy moves: ([heads,] rows of a sequence, columns)."""
        together = (self.heads,) if self.heads > 1 else ()
        return (*together, self.copy_rows, self.columns)

    def map(self, op, tensor: cute.Tensor, group: Int32 | None = None) -> Mapped:
        """The TMA descriptor of a global (batch, seq, heads, dim) or (total, heads, dim) tensor.

        group: heads that belong together, where a tile holds several.
        """
        shape, stride = tensor.shape, tensor.stride
        head, dim, together = (shape[-2], stride[-2]), (shape[-1], 1), ()
        seq, batch = (0, ()) if cute.rank(tensor) == 3 else (1, ((shape[0], stride[0]),))
        base, height = tensor.iterator, self.copy_rows
        if self.heads > 1:
            together, head = ((group, stride[-2]),), (shape[-2] // group, stride[-2] * group)
        if self.ragged:
            modes = ((height, stride[seq]), dim, (shape[seq] + 1, stride[seq]), head, *batch)
            base = base - height * stride[seq]
        else:
            modes = ((shape[seq], stride[seq]), dim, head, *batch)
        modes = (*together, *modes)
        layout = cute.make_layout(tuple(n for n, _ in modes), stride=tuple(s for _, s in modes))
        tile = self._boxed(cute.select(self.layout(), mode=[0, 1]))
        if self.page_size:
            tile = self._copied()
        view = cute.make_tensor(base, layout)
        return Mapped(*cpasync.make_tiled_tma_atom(op, view, tile, self.box))

    def head_rows(
        self, mapped: Mapped, batch: Int32, head, start: Int32, end: Int32, table: cute.Tensor | None = None
    ) -> HeadRows:
        """Rows start <= r < end of one head; start is 0 unless sequences are packed, or in a cache.

        head: with several heads in a tile, (group, first of the tile's heads in it). table: of the sequence's
        pages, where there are any.
        """
        if table is not None:
            return HeadRows(mapped.atom, mapped.coordinates[None, None, None, head, None], start, end, table)
        group, first = head if self.heads > 1 else (head, None)
        kept = (None,) * (len(self.box) + self.ragged)
        place = (group, batch)[: cute.rank(mapped.coordinates) - len(kept)]
        coordinates = mapped.coordinates[(*kept, *place)]
        if self.heads > 1:
            coordinates = cute.domain_offset((first, *(0,) * (len(kept) - 1)), coordinates)
        return HeadRows(mapped.atom, coordinates, start, end)

    def part(self, rows: HeadRows, part: Int32 | int) -> HeadRows:
        """The same rows' columns from the beginning of one of the parts on."""
        if self.parts == 1:
            return rows
        before = len(self.box) - 2
        offset = (*(0,) * before, 0, part * self.columns, *(0,) * self.ragged, *(0,) * bool(self.page_size))
        return rows._replace(coordinates=cute.domain_offset(offset, rows.coordinates))

    def copies(
        self, rows: HeadRows, first: Int32, tile: cute.Tensor
    ) -> Iterator[tuple[cute.Tensor, cute.Tensor]]:
        """The sides of the copies that fill a shared tile with the rows from `first` of a sequence."""
        if rows.table is None:
            yield self.sides(rows, first, tile)
            return
        count = self.sequence_rows // self.copy_rows
        for i in range(0, count, LOOKED_UP):
            # Several pages are looked up before the first is copied: one wait for memory for all of them.
            steps = range(i, min(i + LOOKED_UP, count))
            places = [self._in_page(rows, rows.start + first + s * self.copy_rows) for s in steps]
            for s, place in zip(steps, places, strict=True):
                yield self._sides_of_page(rows, place, cute.local_tile(tile, self.box, (s, 0)))

    def sides(self, rows: HeadRows, first: Int32, tile: cute.Tensor) -> tuple[cute.Tensor, cute.Tensor]:
        """(global, shared) sides of a copy between the rows from `first` of a sequence and a shared tile."""
        at, coordinates, height = rows.start + first, rows.coordinates, self.sequence_rows
        before = len(self.box) - 2
        if self.ragged:
            left = maximum(minimum(rows.end - at, height), 0)
            coordinates = coordinates[(*(None,) * before, None, None, at + left)]
            at = height - left
        coordinates = cute.domain_offset((*(0,) * before, at, 0), coordinates)
        return self._partitioned(rows, coordinates, self._boxed(tile))

    def _in_page(self, rows: HeadRows, at: Int32) -> tuple[Int32, Int32, Int32]:
        """(page, row in it, rows before the sequence's end) of the rows of a copy, from `at` on."""
        left = maximum(minimum(rows.end - at, self.copy_rows), 0)
        # Nothing is looked up beyond the last page in use, of which rows beyond the end copy nothing.
        place = Uint32(minimum(at, rows.end - 1))
        return rows.table[Int32(place // self.page_size)], Int32(place % self.page_size), left

    def _sides_of_page(
        self, rows: HeadRows, place: tuple[Int32, Int32, Int32], part: cute.Tensor
    ) -> tuple[cute.Tensor, cute.Tensor]:
        """As `sides`, of rows that lie in one page, and their part of a shared tile."""
        page, row, left = place
        coordinates = rows.coordinates[None, None, row + left, page]
        coordinates = cute.domain_offset((self.copy_rows - left, 0), coordinates)
        return self._partitioned(rows, coordinates, part)

    def _partitioned(
        self, rows: HeadRows, coordinates: cute.Tensor, tile: cute.Tensor
    ) -> tuple[cute.Tensor, cute.Tensor]:
        box = cute.local_tile(coordinates, self.box, (0,) * len(self.box))
        grouped = (cute.group_modes(side, 0, len(self.box)) for side in (tile, box))
        shared, outer = cpasync.tma_partition(rows.atom, 0, cute.make_layout(1), *grouped)
        return outer, shared

    def _copied(self) -> cute.ComposedLayout:
        """(rows, columns) of one copy's part of a tile."""
        parts = self.columns // self.width
        outer = cute.make_layout(
            (self.copy_rows, (self.width, parts)), stride=(self.width, (1, self.rows * self.width))
        )
        return cute.make_composed_layout(self.layout().inner, 0, outer)

    def _boxed(self, tile):
        """A tile's (rows, dim), a layout or a tensor, seen as `box`."""
        if self.heads == 1:
            return tile
        return cute.composition(tile, cute.make_layout(self.box, stride=(1, self.heads, self.rows)))


def transposed(tile: cute.Tensor) -> cute.Tensor:
    """(rows, dim, ...) seen as (dim, rows, ...)."""
    rest = range(2, cute.rank(tile))
    return cute.make_tensor(tile.iterator, cute.select(tile.layout, [1, 0, *rest]))
