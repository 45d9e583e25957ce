"""Rows of 16 bytes in swizzled tiles of operands, 32 of which ldmatrix reads at a time and stmatrix writes.

A swizzled part of a tile, all rows of some columns, begins at a multiple of 1024 bytes. So the swizzle is the
same wherever a part lies, and 16-byte columns of a row are told apart by the bits that are flipped.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import AddressSpace, Float16, Int32
from cutlass.cute.nvgpu import warp

from ...common.operand import Operand


def address(tile: cute.Tensor) -> Int32:
    """Of a tile in shared memory."""
    return tile.iterator.toint().to(Int32)


def swizzled(operand: Operand, place: Int32) -> Int32:
    """Where the swizzle puts what would be at `place` of a part."""
    return place ^ (place >> 3 & operand.width - 16)


def read(rows: Int32, words: cute.Tensor, transposed: bool) -> None:
    """ldmatrix.x4: a lane's row to four words of all lanes. rows: each lane's address."""
    _copy(warp.LdMatrix8x8x16bOp(transposed, 4), _pointer(rows), words.iterator)


def write(words: cute.Tensor, rows: Int32, transposed: bool = False) -> None:
    """stmatrix.x4: four words of all lanes to a row of each."""
    _copy(warp.StMatrix8x8x16bOp(transposed, 4), words.iterator, _pointer(rows))


def _pointer(address: Int32) -> cute.Pointer:
    return cute.make_ptr(Float16, address, AddressSpace.smem, assumed_align=16)


def _copy(op, source: cute.Pointer, target: cute.Pointer) -> None:
    """16 bytes, or four words, as eight 16-bit numbers."""
    layout = cute.make_layout(((8, 1),))
    sides = (cute.make_tensor(cute.recast_ptr(side, dtype=Float16), layout) for side in (source, target))
    cute.copy(cute.make_copy_atom(op, Float16), *sides)
