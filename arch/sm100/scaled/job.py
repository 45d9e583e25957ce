"""What the roles share besides what they do for 16 bits: the tiles' factors."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32

from ...common.memory import Tiles
from ...common.operand import Mapped
from . import factors


class FactorTiles(NamedTuple):
    """(words, inner atoms, outer atoms, tiles or stages) of an operand's factors; None where it has none."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor | None


class Memory(NamedTuple):
    """As for 16 bits."""

    tiles: Tiles
    factors: cute.Tensor
    address: cute.Pointer
    factor_tiles: FactorTiles
    tensor: cute.Pointer | None = None

    def looked_up(self) -> Memory:
        """With tensor memory's place, from its word."""
        return self._replace(tensor=cute.arch.retrieve_tmem_ptr(Float32, 16, self.address))


class FactorMaps(NamedTuple):
    """Of an operand's factors; None where it has none."""

    q: factors.Mapped
    k: factors.Mapped
    v: factors.Mapped | None


class Maps(NamedTuple):
    """The tensors as TMA sees them; no `out` where it leaves from registers."""

    q: Mapped
    k: Mapped
    v: Mapped
    out: Mapped | None
    factors: FactorMaps
