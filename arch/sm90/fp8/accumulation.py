"""How P V is summed over the tiles of keys, as the tensor core's own sum keeps only some 14 bits.

    one level                  O += P V                       O *= rescale
    two levels, of each tile   part = P V                     O = O * rescale + part * scale of V's block
    two levels, of n tiles     part += P V                    O, part *= rescale
                               after n: O += part, part = 0

What the tensor core loses of a sum grows with the number of tiles in it; O += part, in fp32, loses next to
nothing. A part of several tiles is of one maximum, as O is, so that both are rescaled for a new one.

A part of one tile needs to be no wider than a product: equal pieces of it, by O's columns and by spans of
keys, are multiplied one after another, in the same registers. Until the first of its pieces is there, O owes
the factor that took the maximum to this tile's: both are one fma.

Each kind has O, `o`; `part`, where products go, on one level O itself; how many `pieces` a tile's product
has, and how many of these `spans` have the same columns.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from ...common.fragment import rows_by_columns
from ..mma import accumulator, begin_sum


class OneLevel(NamedTuple):
    """O is the tensor core's sum."""

    o: cute.Tensor

    pieces = spans = 1

    @property
    def part(self) -> cute.Tensor:
        return self.o

    def begin(self, pv: cute.TiledMma, steps: list[tuple[cute.Tensor, cute.Tensor]]) -> None:
        """Begin to add a tile's product. steps: of P and V."""
        begin_sum(pv, self.o, steps, 1, accumulate=True)

    def take_over(self, piece: int, turn: Int32, scale: None) -> None:
        """Product `turn` is there."""

    def follow(self, factors: cute.Tensor) -> None:
        """O is multiplied by `factors` for the next product's maximum."""
        rescale((self.o,), factors)

    def finish(self, piece: int, scale: None) -> None:
        """The last product is there."""


class EachTile(NamedTuple):
    """O, in fp32, takes over each tile's product, by pieces. owed: (rows,), O's factors for the next one."""

    o: cute.Tensor
    part: cute.Tensor
    owed: cute.Tensor
    spans: int

    @property
    def pieces(self) -> int:
        return cute.size(self.o) // cute.size(self.part) * self.spans

    def begin(self, pv: cute.TiledMma, steps: list[tuple[cute.Tensor, cute.Tensor]]) -> None:
        """Begin a piece of a tile's product. steps: of P and V."""
        begin_sum(pv, self.part, steps, 1)

    def take_over(self, piece: int, turn: Int32, scale: Float32 | None) -> None:
        """A piece of product `turn`, to be multiplied by `scale`, is there."""
        self.finish(piece, scale)

    def follow(self, factors: cute.Tensor) -> None:
        """The next product's maximum takes `factors`."""
        for r in range(cute.size(factors)):
            self.owed[r] = factors[r]

    def finish(self, piece: int, scale: Float32 | None) -> None:
        """As `take_over`, of the last product."""
        columns, span = divmod(piece, self.spans)
        o = cute.make_tensor(self.o.iterator + columns * cute.size(self.part), self.part.layout)
        add(o, self.part, scale, None if span else self.owed)


class SeveralTiles(NamedTuple):
    """O, in fp32, takes over the tensor core's sum of every `interval` tiles."""

    o: cute.Tensor
    part: cute.Tensor
    interval: int

    pieces = spans = 1

    def begin(self, pv: cute.TiledMma, steps: list[tuple[cute.Tensor, cute.Tensor]]) -> None:
        """Begin to add a tile's product to the part. steps: of P and V."""
        begin_sum(pv, self.part, steps, 1, accumulate=True)

    @cute.jit
    def take_over(self, piece: int, turn: Int32, scale: None):
        """Product `turn` is there."""
        if turn % self.interval == self.interval - 1:
            add(self.o, self.part, None, None)
            self.part.fill(0.0)

    def follow(self, factors: cute.Tensor) -> None:
        """O and the part are multiplied by `factors` for the next product's maximum."""
        rescale((self.o, self.part), factors)

    def finish(self, piece: int, scale: None) -> None:
        """The last product is there, in a part of as many tiles as are left."""
        add(self.o, self.part, None, None)


Sums = OneLevel | EachTile | SeveralTiles


def accumulation(o: cute.Tensor, promotion: int, columns: int, spans: int) -> Sums:
    """Of O, which is 0 yet. promotion: as the config's. columns: of a piece. spans: of a tile's keys."""
    if promotion == 0:
        return OneLevel(o)
    if promotion == 1:
        owed = cute.make_rmem_tensor(2, Float32)
        owed.fill(0.0)
        return EachTile(o, accumulator(columns), owed, spans)
    part = cute.make_rmem_tensor_like(o)
    part.fill(0.0)
    return SeveralTiles(o, part, promotion)


def add(o: cute.Tensor, part: cute.Tensor, scale: Float32 | None, factors: cute.Tensor | None) -> None:
    """O = O * factors + part * scale, row by row; without factors, or without a scale, where None."""
    o, part = rows_by_columns(o), rows_by_columns(part)
    for r in range(cute.size(o, mode=[0])):
        for c in range(cute.size(o, mode=[1])):
            added = part[r, c] if scale is None else part[r, c] * scale
            o[r, c] = o[r, c] + added if factors is None else cute.math.fma(o[r, c], factors[r], added)


@cute.jit
def rescale(sums: tuple[cute.Tensor, ...], factors: cute.Tensor):
    """Sums *= factors, row by row, unless no row of the warp has a new maximum."""
    if cute.arch.vote_any_sync((factors[0] != 1.0) | (factors[1] != 1.0)):
        for s in cutlass.range_constexpr(len(sums)):
            rows = rows_by_columns(sums[s])
            for r in cutlass.range_constexpr(cute.size(rows, mode=[0])):
                for c in cutlass.range_constexpr(cute.size(rows, mode=[1])):
                    rows[r, c] = rows[r, c] * factors[r]
