"""Shared memory of the kernels whose operands TMA moves."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute

try:
    from cutlass.memory import SmemAllocator
except ImportError:  # before 4.8
    from cutlass.utils import SmemAllocator

from .operand import Mapped, Operand


class Maps(NamedTuple):
    """The tensors as TMA sees them; no `out` where it leaves from registers."""

    q: Mapped
    k: Mapped
    v: Mapped
    out: Mapped | None


class Tiles(NamedTuple):
    """(rows, dim, tiles) of q and out, (rows, dim, stages) of k and v; `out` may be in q's place."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    out: cute.Tensor

    @staticmethod
    def allocate(
        smem: SmemAllocator, q: Operand, k: Operand, v: Operand, out: Operand, apart: bool
    ) -> Tiles:
        """apart: `out` has a place of its own."""
        if apart:
            return Tiles(*(_tensor(smem, operand) for operand in (q, k, v, out)))
        larger = _tensor(smem, max(q, out, key=lambda operand: operand.bytes))
        return Tiles(_in_place(larger, q), _tensor(smem, k), _tensor(smem, v), _in_place(larger, out))


def _tensor(smem: SmemAllocator, operand: Operand) -> cute.Tensor:
    shape, swizzle = operand.layout().outer, operand.layout().inner
    return smem.allocate_tensor(operand.dtype, shape, byte_alignment=1024, swizzle=swizzle)


def _in_place(tile: cute.Tensor, operand: Operand) -> cute.Tensor:
    pointer = cute.recast_ptr(tile.iterator, operand.layout().inner, operand.dtype)
    return cute.make_tensor(pointer, operand.layout().outer)
