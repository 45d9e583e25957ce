"""The two block-scaled products, and which columns of tensor memory hold their factors.

    S = Q K        kind::mxf8f6f4, a factor of 32 columns to a step, or kind::mxf4nvf4, four of 16
    O += P V       kind::f8f6f4 without factors, or kind::mxf8f6f4 with V's, of 32 keys, and 1 for all of P's
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Float4E2M1FN, Float8E4M3FN
from cutlass.cute.nvgpu import OperandMajorMode, tcgen05

from ...common.memory import in_place
from ...common.operand import Operand
from ...common.regions import Region, Regions
from ...precision import FLOAT4_E2M1
from .. import mma, tmem
from ..group import ALONE, Group
from ..tmem import ROWS
from .config import P_COLUMNS

K, MN = OperandMajorMode.K, OperandMajorMode.MN
SMEM, TMEM = tcgen05.OperandSource.SMEM, tcgen05.OperandSource.TMEM


@dataclass(frozen=True)
class Plan(tmem.Plan):
    """As for 16 bits, and factors: those of Q and of P for each Q tile, those of K and of V for one block.

    factors: (operand, columns), of operands that have any.
    """

    factors: tuple[tuple[str, int], ...] = ()

    @functools.cached_property
    def regions(self) -> Regions:
        """Their columns, of 32 bits."""
        base = super().regions
        counts = {"q": self.tiles, "k": 1, "v": 1}
        read = {"q": "qk", "k": "qk", "v": "pv"}
        more = [
            Region(name=f"{name} factors", size=size, count=counts[name], filled="spread", read=read[name])
            for name, size in self.factors
        ]
        if "v" in dict(self.factors):
            more.append(
                Region(name="p factors", size=P_COLUMNS, count=self.tiles, filled="softmax", read="pv")
            )
        return Regions(
            regions=(*base.regions, *more), steps=("spread", *base.steps), unit=base.unit, room=base.room
        )

    def of(self, operand: str, tile: int = 0) -> int:
        """First column of an operand's factors."""
        return self.regions.at(f"{operand} factors", tile)


@dataclass(frozen=True)
class Products(mma.Products):
    """As for 16 bits. dtype: of q and k. scales_v: the second one has factors, too."""

    scales_v: bool = False

    def q(self, tiles: cute.Tensor) -> cute.Tensor:
        return super().q(self._elements(tiles))

    def k(self, tiles: cute.Tensor) -> cute.Tensor:
        return super().k(self._elements(tiles))

    def qk(self) -> cute.TiledMma:
        return self._qk(self.plan.tile_n, self.group)

    def own_qk(self) -> cute.ThrMma:
        return self._qk(self.plan.tile_n // self.group.ctas, ALONE).get_slice(0)

    def pv(self) -> cute.TiledMma:
        return self._pv(self.plan.dim_v, self.group)

    def own_pv(self) -> cute.ThrMma:
        return self._pv(self.plan.dim_v // self.group.ctas, ALONE).get_slice(0)

    def _elements(self, tiles: cute.Tensor) -> cute.Tensor:
        """Tiles of q or k, which TMA fills as bytes, of what the product takes."""
        if self.dtype is not Float4E2M1FN:
            return tiles
        rows, nbytes, stages = (cute.size(tiles, mode=[mode]) for mode in range(3))
        return in_place(tiles, Operand.of(FLOAT4_E2M1, rows, 2 * nbytes, stages, False))

    def _qk(self, count: int, group: Group) -> cute.TiledMma:
        shape = ROWS * group.ctas, count
        if self.dtype is Float4E2M1FN:
            return cute.make_tiled_mma(tcgen05.MmaMXF4NVF4Op(Float8E4M3FN, (*shape, 64), group.kind, SMEM))
        return scaled_mma(self.dtype, count, SMEM, K, group)

    def _pv(self, count: int, group: Group) -> cute.TiledMma:
        if self.scales_v:
            return scaled_mma(self.p_dtype, count, TMEM, MN, group)
        return mma.tiled_mma(self.p_dtype, count, TMEM, MN, group)


def scaled_mma(
    dtype: type, count: int, a_in: tcgen05.OperandSource, b_major: OperandMajorMode, group: Group
) -> cute.TiledMma:
    """128 rows per CTA x count x 32 bytes, of 8 bits, with a factor for each row and column."""
    shape = ROWS * group.ctas, count, 32
    return cute.make_tiled_mma(tcgen05.MmaMXF8F6F4Op(dtype, dtype, shape, group.kind, a_in, K, b_major))
