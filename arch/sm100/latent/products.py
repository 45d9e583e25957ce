"""The two products of a pair of CTAs, 64 rows each: what they multiply, and where their results are.

    S = Q K        rows x keys; a CTA has its rows of Q, and half of the keys
    O += P V       rows x columns; its rows of P, and half of the columns

Either's result takes all 128 lanes: a row's first half of the columns lies in lane `row`, what comes from the
other CTA 64 lanes below. As an operand in tensor memory P would have to lie in one lane, so it is read from
shared memory.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Int32

from ...common.operand import transposed
from ...common.regions import Region, Regions
from .. import tmem
from ..backward.products import as_a, as_b
from ..group import Group
from ..mma import MN, SMEM, K, tiled_mma
from .config import ROWS


@dataclass(frozen=True)
class Plan(tmem.Plan):
    """S twice, and O. tile_n: keys of a lane, half of a block's. dim_v: columns of a lane, half of V's."""

    @functools.cached_property
    def regions(self) -> Regions:
        return Regions(
            regions=(
                Region(name="s", size=self.tile_n, count=self.slots, filled="qk", read="softmax"),
                Region(name="o", size=self.dim_v, filled="pv", read="correction"),
            ),
            steps=("qk", "softmax", "pv", "correction"),
            unit="columns of tensor memory",
            room=tmem.COLUMNS,
        )

    def p(self, tile: int | Int32, turn: int | Int32) -> int:
        """P's first column, in shared memory."""
        return 0


@dataclass(frozen=True)
class Products:
    """plan: where results are. group: the pair. v_columns: of a CTA's part of V."""

    dtype: type
    plan: Plan
    group: Group
    v_columns: int

    def qk(self, group: Group) -> cute.TiledMma:
        """Of S. group: the pair, or ALONE: what is a CTA's own."""
        return tiled_mma(self.dtype, self.plan.tile_n * group.ctas, SMEM, K, group, rows=ROWS)

    def pv(self, group: Group) -> cute.TiledMma:
        """Of a part of O's columns, likewise."""
        return tiled_mma(self.dtype, self.v_columns * group.ctas, SMEM, MN, group, rows=ROWS)

    def q(self, parts: cute.Tensor) -> cute.Tensor:
        """Descriptors (mma, rows, k, parts) of (rows, dim, parts)."""
        return as_a(self.qk, self.group, parts)

    def k(self, parts: cute.Tensor) -> cute.Tensor:
        """Descriptors (mma, keys, k, parts) of (keys, dim, parts)."""
        return as_b(self.qk, self.group, parts)

    def p(self, tile: cute.Tensor) -> cute.Tensor:
        """Descriptors (mma, rows, k, 1) of (rows, keys, 1)."""
        return as_a(self.pv, self.group, tile)

    def v(self, parts: cute.Tensor) -> cute.Tensor:
        """Descriptors (mma, columns, k, parts) of (keys, columns, parts)."""
        return as_b(self.pv, self.group, transposed(parts))

    def s(self, base: cute.Pointer, turn: Int32) -> cute.Tensor:
        """S of block number `turn` as the product writes it."""
        return self.result(self.qk(self.group), base + self.plan.s(0, turn), self.plan.tile_n)

    def o(self, base: cute.Pointer, part: int) -> cute.Tensor:
        """A part of O's columns as the product writes it."""
        return self.result(self.pv(self.group), base + self.plan.o(0) + part * self.v_columns, self.v_columns)

    def result(self, mma: cute.TiledMma, base: cute.Pointer, columns: int) -> cute.Tensor:
        """What a product writes from `base` on. columns: that come from each CTA."""
        shape = mma.partition_shape_C((ROWS * self.group.ctas, columns * self.group.ctas))
        return cute.make_tensor(base, mma.make_fragment_C(shape).layout)
