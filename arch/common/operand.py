"""Operands that TMA moves: a swizzled shared tile, and a head's rows in global memory, declared once.

A tile is (rows, dim) with dim in whole 16-element steps, swizzled over as wide a part of the row as
divides it. TMA fills with zeros what lies outside the tensor, so padding columns and rows past the end
need no clearing; stores leave out what lies outside.

A tensor's own bound ends the rows of a dense sequence. Where sequences end inside the tensor (packed, or
partly used) row r of a sequence is given two coordinates (i, j) at address `base + (i + j - rows) * stride`,
with i bounded by the tile's height: choosing i = rows - (what is left of the sequence) puts the bound where
the sequence ends. So nothing of the next sequence is ever read or written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync

from ..elementwise import maximum, minimum

STEP = 16  # elements of one matrix instruction's k step


def padded(dim: int) -> int:
    """Columns that a head dim takes in shared memory."""
    return -(-dim // STEP) * STEP


class Mapped(NamedTuple):
    """A tensor as TMA sees it: (rows, dim, heads, batch), or (tile rows, dim, start, heads[, batch])."""

    atom: cute.CopyAtom
    coordinates: cute.Tensor


class HeadRows(NamedTuple):
    """One head's rows of one sequence: start <= r < end of `coordinates`, which has no head mode left."""

    atom: cute.CopyAtom
    coordinates: cute.Tensor
    start: Int32
    end: Int32


@dataclass(frozen=True)
class Operand:
    """A tile of `rows` rows, `stages` of them in shared memory, `pitch` elements apart.

    dim: columns in global memory, padded in shared memory. ragged: sequences end inside the tensor.
    """

    dtype: type
    rows: int
    dim: int
    stages: int
    ragged: bool
    pitch: int

    @staticmethod
    def of(dtype: type, rows: int, dim: int, stages: int, ragged: bool, pitch: int = 0) -> Operand:
        """An operand whose tiles are `pitch` elements apart, at least their size."""
        return Operand(dtype, rows, dim, stages, ragged, max(pitch, rows * padded(dim)))

    @property
    def bytes(self) -> int:
        """What one tile's copy transfers, zeros included."""
        return self.rows * padded(self.dim) * self.dtype.width // 8

    @property
    def width(self) -> int:
        """Columns of a swizzled part: 64, 32 or 16."""
        return next(width for width in (64, 32, 16) if padded(self.dim) % width == 0)

    def layout(self) -> cute.ComposedLayout:
        """(rows, dim, stages): a layout, and the swizzle of its bytes."""
        bits = {64: 3, 32: 2, 16: 1}[self.width]
        atom = cute.make_layout((8, self.width), stride=(self.width, 1))
        tile = cute.tile_to_shape(atom, (self.rows, padded(self.dim)), (0, 1))
        staged = cute.append(tile, cute.make_layout(self.stages, stride=self.pitch))
        return cute.make_composed_layout(cute.make_swizzle(bits, 4, 3), 0, staged)

    def map(self, op, tensor: cute.Tensor) -> Mapped:
        """The TMA descriptor of a global (batch, seq, heads, dim) or (total, heads, dim) tensor."""
        shape, stride = tensor.shape, tensor.stride
        head, dim = (shape[-2], stride[-2]), (shape[-1], 1)
        seq, batch = (0, ()) if cute.rank(tensor) == 3 else (1, ((shape[0], stride[0]),))
        base = tensor.iterator
        if self.ragged:
            modes = ((self.rows, stride[seq]), dim, (shape[seq] + 1, stride[seq]), head, *batch)
            base = base - self.rows * stride[seq]
        else:
            modes = ((shape[seq], stride[seq]), dim, head, *batch)
        layout = cute.make_layout(tuple(n for n, _ in modes), stride=tuple(s for _, s in modes))
        view, tile = cute.make_tensor(base, layout), cute.select(self.layout(), mode=[0, 1])
        return Mapped(*cpasync.make_tiled_tma_atom(op, view, tile, (self.rows, padded(self.dim))))

    def head_rows(self, mapped: Mapped, batch: Int32, head: Int32, start: Int32, end: Int32) -> HeadRows:
        """Rows start <= r < end of one head; start is 0 unless sequences are packed."""
        last = (head, batch)[: cute.rank(mapped.coordinates) - (3 if self.ragged else 2)]
        middle = (None,) if self.ragged else ()
        return HeadRows(mapped.atom, mapped.coordinates[(None, None, *middle, *last)], start, end)

    def sides(self, rows: HeadRows, first: Int32, tile: cute.Tensor) -> tuple[cute.Tensor, cute.Tensor]:
        """(global, shared) sides of a copy between the rows from `first` of a sequence and a shared tile."""
        at, coordinates = rows.start + first, rows.coordinates
        if self.ragged:
            left = maximum(minimum(rows.end - at, self.rows), 0)
            coordinates = cute.domain_offset((self.rows - left, 0), coordinates[None, None, at + left])
        else:
            coordinates = cute.domain_offset((at, 0), coordinates)
        box = cute.local_tile(coordinates, (self.rows, padded(self.dim)), (0, 0))
        grouped = cute.group_modes(tile, 0, 2), cute.group_modes(box, 0, 2)
        shared, outer = cpasync.tma_partition(rows.atom, 0, cute.make_layout(1), *grouped)
        return outer, shared


def transposed(tile: cute.Tensor) -> cute.Tensor:
    """(rows, dim, ...) seen as (dim, rows, ...)."""
    rest = range(2, cute.rank(tile))
    return cute.make_tensor(tile.iterator, cute.select(tile.layout, [1, 0, *rest]))
