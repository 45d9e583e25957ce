"""Shared memory of the kernels whose operands TMA moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import cutlass.cute as cute

try:
    from cutlass.memory import SmemAllocator
except ImportError:  # before 4.8
    from cutlass.utils import SmemAllocator

from .operand import Mapped, Operand
from .regions import Region, Regions


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
        operands, tiles = {"q": q, "k": k, "v": v, "out": out}, {}
        regions = regions_of(operands, apart)
        for place in regions.places():
            shared = {region.name: operands[region.name] for region in regions.sharing(place)}
            largest = allocate(smem, max(shared.values(), key=lambda operand: operand.bytes))
            alone = len(shared) == 1
            tiles |= {name: largest if alone else in_place(largest, o) for name, o in shared.items()}
        return Tiles(**tiles)


def regions_of(operands: Mapping[str, Operand], apart: bool) -> Regions:
    """Where tiles lie. apart: the next Q comes before `out` has left, so that it must not lie over Q."""
    lifetimes = {
        "q": ("load", "store" if apart else "qk"),
        "k": ("load", "qk"),
        "v": ("load", "pv"),
        "out": ("output", "store"),
    }
    return Regions(
        regions=tuple(
            Region(
                name=name,
                size=operands[name].bytes,
                count=operands[name].stages,
                filled=filled,
                read=read,
                over="q" if name == "out" and not apart else None,
            )
            for name, (filled, read) in lifetimes.items()
        ),
        steps=("load", "qk", "softmax", "pv", "output", "store"),
        unit="bytes of shared memory",
    )


def allocate(smem: SmemAllocator, operand: Operand) -> cute.Tensor:
    """Places for an operand's tiles."""
    shape, swizzle = operand.layout().outer, operand.layout().inner
    return smem.allocate_tensor(operand.dtype, shape, byte_alignment=1024, swizzle=swizzle)


def in_place(tile: cute.Tensor, operand: Operand) -> cute.Tensor:
    """An operand's tiles in the places of others."""
    pointer = cute.recast_ptr(tile.iterator, operand.layout().inner, operand.dtype)
    return cute.make_tensor(pointer, operand.layout().outer)
