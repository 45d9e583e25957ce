"""Factors on their way: by TMA to shared memory, by `tcgen05.cp` to tensor memory, and as products find them.

What lies where is in `atoms`.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import AddressSpace, Float8E4M3FN, Float8E8M0FNU, Int32, Int64
from cutlass._mlir.dialects import llvm, nvvm
from cutlass.cute.nvgpu import cpasync

from ...block_scaled import ATOM_GROUPS, ATOM_ROWS
from .atoms import ATOM_BYTES, COLUMNS, QUARTER, WORDS, Factors

# Of an atom in shared memory: 16 bytes a row, eight rows to a core matrix, 128 bytes to the next, no swizzle.
DESCRIPTOR = 1 << 16 | 128 >> 4 << 32 | 1 << 46
TYPES = {"float8_e8m0fnu": Float8E8M0FNU, "float8_e4m3fn": Float8E4M3FN}


class Mapped(NamedTuple):
    """A tensor of factors as TMA sees it: (words of an atom, inner atoms, outer atoms, heads, batch)."""

    atom: cute.CopyAtom
    coordinates: cute.Tensor


def mapped(factors: Factors, op, tensor: cute.Tensor) -> Mapped:
    """The TMA descriptor of a global (batch, heads, outer atoms, inner atoms, 32, 4, 4) tensor of bytes."""
    batch, heads, outer, inner = tensor.shape[:4]
    shape = WORDS, inner, outer, heads, batch
    strides = 1, WORDS, WORDS * inner, WORDS * inner * outer, WORDS * inner * outer * heads
    words = cute.recast_ptr(tensor.iterator, dtype=Int64)
    view = cute.make_tensor(words, cute.make_layout(shape, stride=strides))
    return Mapped(*cpasync.make_tiled_tma_atom(op, view, cute.make_layout(factors.box), factors.box))


def places(factors: Factors) -> cute.Layout:
    """(words, inner atoms, outer atoms, places) of shared memory."""
    return cute.make_layout((*factors.box, factors.places))


def copy(
    factors: Factors, source: Mapped, head: tuple, first: Int32, target: cute.Tensor, barrier: cute.Pointer
) -> None:
    """Begin copying the factors of the tile that begins with row or key `first`. head: (head, batch)."""
    atom = first // ATOM_ROWS
    offset = (0, atom, 0) if factors.of_v else (0, 0, atom)
    coordinates = cute.domain_offset(offset, source.coordinates[(None, None, None, *head)])
    box = cute.local_tile(coordinates, factors.box, (0, 0, 0))
    grouped = (cute.group_modes(side, 0, 3) for side in (target, box))
    shared, outer = cpasync.tma_partition(source.atom, 0, cute.make_layout(1), *grouped)
    cute.copy(source.atom, outer, shared, tma_bar_ptr=barrier)


@cute.jit
def spread(factors: cutlass.Constexpr, tile: cute.Tensor, tensor: Int32, first: Int32):
    """Begin copying a tile's factors from shared memory to columns from `tensor` on.

    first: the tile's first row or key. The warp whose products come after calls this: such a copy and a
    product happen in the order in which a thread has begun them.
    """
    shared = tile.iterator.toint().to(Int32)
    quarter = first % ATOM_ROWS // QUARTER
    with cute.arch.elect_one():
        for s in cutlass.range_constexpr(factors.span):
            for a in cutlass.range_constexpr(factors.across):
                number = s + a * factors.span if factors.of_v else a + s * factors.across
                if cutlass.const_expr(factors.of_v):
                    column = Int32(s * factors.pitch + COLUMNS * a)
                else:
                    column = a * factors.pitch + factors.margin + COLUMNS * s - quarter
                _spread_atom(shared + ATOM_BYTES * number, tensor + column)


def of_step(factors: Factors, tensor: Int32, step: int, first: Int32 | int = 0) -> cute.Pointer:
    """Where a product finds the factors of its step along k. first: the tile's first row or key."""
    if factors.of_v:
        group = first % ATOM_ROWS // QUARTER + step
        return _pointer(factors, tensor + group // ATOM_GROUPS * factors.pitch, group % ATOM_GROUPS)
    atom, place = divmod(step, factors.steps)
    column = tensor + atom * factors.pitch + factors.margin
    return _pointer(factors, column, place * (ATOM_GROUPS // factors.steps))


def _pointer(factors: Factors, column: Int32, byte: Int32 | int) -> cute.Pointer:
    """The byte of a column stands in the highest bits."""
    return cute.make_ptr(TYPES[factors.scale], Int32(column) | Int32(byte) << 30, AddressSpace.tmem)


def _spread_atom(shared: Int32, column: Int32) -> None:
    descriptor = (shared >> 4 & 0x3FFF).to(Int64) | DESCRIPTOR
    target = llvm.inttoptr(llvm.PointerType.get(6), Int32(column).ir_value())
    nvvm.tcgen05_cp(
        nvvm.Tcgen05CpShape.SHAPE_32x128b, target, descriptor.ir_value(),
        group=nvvm.CTAGroupKind.CTA_1, multicast=nvvm.Tcgen05CpMulticast.WARPX4,
    )
