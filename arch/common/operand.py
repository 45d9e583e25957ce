"""Operands that TMA moves: a swizzled shared tile, and a head's rows in global memory, declared once.

A tile is (rows, dim) with dim in whole k steps of matrix instructions, swizzled over as wide a part of the
row as divides it. TMA fills with zeros what lies outside the tensor, so padding columns and rows past the end
need no clearing; stores leave out what lies outside.

A tensor's own bound ends the rows of a dense sequence. Where sequences end inside the tensor (packed, or
partly used) row r of a sequence is given two coordinates (i, j) at address `base + (i + j - rows) * stride`,
with i bounded by the tile's height: choosing i = rows - (what is left of the sequence) puts the bound where
the sequence ends. So nothing of the next sequence is ever read or written.

A tile may hold several query heads that share a KV head: row i is then row i // heads of head i % heads. TMA
takes them as one more dimension, which ends with the group: rows of heads beyond are zeros, and not written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync

from ..elementwise import maximum, minimum
from ..precision import Precision
from .element import element_type


class Mapped(NamedTuple):
    """A tensor as TMA sees it: (rows, dim, heads, batch), or (tile rows, dim, start, heads[, batch]).

    With several heads in a tile: the heads of a group come first, and `heads` counts groups.
    """

    atom: cute.CopyAtom
    coordinates: cute.Tensor


class HeadRows(NamedTuple):
    """One head's or group's rows of one sequence: start <= r < end of `coordinates`.

    coordinates: ([heads of the group,] rows, dim), or with `start` between rows and dim.
    """

    atom: cute.CopyAtom
    coordinates: cute.Tensor
    start: Int32
    end: Int32


@dataclass(frozen=True)
class Operand:
    """A tile of `rows` rows, `stages` of them in shared memory, `pitch` elements apart.

    dim: columns in global memory, padded in shared memory. ragged: sequences end inside the tensor.
    heads: in one tile, a divisor of `rows`. parts: of the columns, of which a tile holds one.
    """

    precision: Precision
    rows: int
    dim: int
    stages: int
    ragged: bool
    pitch: int
    heads: int = 1
    parts: int = 1

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
        return self.precision.swizzle_width(self.columns)

    def layout(self) -> cute.ComposedLayout:
        """(rows, dim, stages): a layout, and the swizzle of its bytes."""
        bits = {128: 3, 64: 2, 32: 1}[self.precision.nbytes(self.width)]
        atom = cute.make_layout((8, self.width), stride=(self.width, 1))
        tile = cute.tile_to_shape(atom, (self.rows, self.columns), (0, 1))
        staged = cute.append(tile, cute.make_layout(self.stages, stride=self.pitch))
        return cute.make_composed_layout(cute.make_swizzle(bits, 4, 3), 0, staged)

    @property
    def box(self) -> tuple[int, ...]:
        """What one copy moves: ([heads,] rows of a sequence, columns)."""
        together = (self.heads,) if self.heads > 1 else ()
        return (*together, self.sequence_rows, self.columns)

    def map(self, op, tensor: cute.Tensor, group: Int32 | None = None) -> Mapped:
        """The TMA descriptor of a global (batch, seq, heads, dim) or (total, heads, dim) tensor.

        group: heads that belong together, where a tile holds several.
        """
        shape, stride = tensor.shape, tensor.stride
        head, dim, together = (shape[-2], stride[-2]), (shape[-1], 1), ()
        seq, batch = (0, ()) if cute.rank(tensor) == 3 else (1, ((shape[0], stride[0]),))
        base, height = tensor.iterator, self.sequence_rows
        if self.heads > 1:
            together, head = ((group, stride[-2]),), (shape[-2] // group, stride[-2] * group)
        if self.ragged:
            modes = ((height, stride[seq]), dim, (shape[seq] + 1, stride[seq]), head, *batch)
            base = base - height * stride[seq]
        else:
            modes = ((shape[seq], stride[seq]), dim, head, *batch)
        modes = (*together, *modes)
        layout = cute.make_layout(tuple(n for n, _ in modes), stride=tuple(s for _, s in modes))
        view, tile = cute.make_tensor(base, layout), self._boxed(cute.select(self.layout(), mode=[0, 1]))
        return Mapped(*cpasync.make_tiled_tma_atom(op, view, tile, self.box))

    def head_rows(self, mapped: Mapped, batch: Int32, head, start: Int32, end: Int32) -> HeadRows:
        """Rows start <= r < end of one head; start is 0 unless sequences are packed.

        head: with several heads in a tile, (group, first of the tile's heads in it).
        """
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
        offset = (*(0,) * before, 0, part * self.columns, *(0,) * self.ragged)
        return rows._replace(coordinates=cute.domain_offset(offset, rows.coordinates))

    def sides(self, rows: HeadRows, first: Int32, tile: cute.Tensor) -> tuple[cute.Tensor, cute.Tensor]:
        """(global, shared) sides of a copy between the rows from `first` of a sequence and a shared tile."""
        at, coordinates, height = rows.start + first, rows.coordinates, self.sequence_rows
        before = len(self.box) - 2
        if self.ragged:
            left = maximum(minimum(rows.end - at, height), 0)
            coordinates = coordinates[(*(None,) * before, None, None, at + left)]
            at = height - left
        coordinates = cute.domain_offset((*(0,) * before, at, 0), coordinates)
        box, tile = cute.local_tile(coordinates, self.box, (0,) * len(self.box)), self._boxed(tile)
        grouped = (cute.group_modes(side, 0, len(self.box)) for side in (tile, box))
        shared, outer = cpasync.tma_partition(rows.atom, 0, cute.make_layout(1), *grouped)
        return outer, shared

    def _boxed(self, tile):
        """A tile's (rows, dim), a layout or a tensor, seen as `box`."""
        if self.heads == 1:
            return tile
        return cute.composition(tile, cute.make_layout(self.box, stride=(1, self.heads, self.rows)))


def transposed(tile: cute.Tensor) -> cute.Tensor:
    """(rows, dim, ...) seen as (dim, rows, ...)."""
    rest = range(2, cute.rank(tile))
    return cute.make_tensor(tile.iterator, cute.select(tile.layout, [1, 0, *rest]))
