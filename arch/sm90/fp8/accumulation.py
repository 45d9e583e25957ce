"""How P V is summed over the tiles of keys, as the tensor core's own sum keeps only some 14 bits.

    one level                  O += P V                       O *= rescale
    two levels, of each tile   part = P V                     O = (O + part * scale of V's block) * rescale
    two levels, of n tiles     part += P V                    O, part *= rescale
                               after n: O += part, part = 0

What the tensor core loses of a sum grows with the number of tiles in it; O += part, in fp32, loses next to
nothing. A part of several tiles is of one maximum, as O is, so that both are rescaled for a new one.

Each kind has O, `o`, and `part`, where products go: on one level that is O itself.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from ...common.fragment import rows_by_columns
from ..mma import begin


class OneLevel(NamedTuple):
    """O is the tensor core's sum."""

    o: cute.Tensor

    @property
    def part(self) -> cute.Tensor:
        return self.o

    def begin(self, pv: cute.TiledMma, p: cute.Tensor, v: cute.Tensor) -> None:
        """Begin to add a tile's product."""
        begin(pv, self.o, p, v, accumulate=True)

    def take_over(self, turn: Int32, scale: None, factors: cute.Tensor) -> None:
        """Product `turn` is there; O is rescaled by `factors` for the next one's maximum."""
        rescale((self.o,), factors)

    def finish(self, scale: None) -> None:
        """The last product is there."""


class TwoLevels(NamedTuple):
    """O, in fp32, takes over the tensor core's sum of every `interval` tiles."""

    o: cute.Tensor
    part: cute.Tensor
    interval: int

    def begin(self, pv: cute.TiledMma, p: cute.Tensor, v: cute.Tensor) -> None:
        """Begin to add a tile's product to the part, or to make it the part."""
        begin(pv, self.part, p, v, accumulate=self.interval > 1)

    @cute.jit
    def take_over(self, turn: Int32, scale: Float32 | None, factors: cute.Tensor):
        """Product `turn`, to be multiplied by `scale`, is there; then as on one level."""
        if cutlass.const_expr(self.interval == 1):
            add(self.o, self.part, scale, factors)
        else:
            if turn % self.interval == self.interval - 1:
                add(self.o, self.part, None, None)
                self.part.fill(0.0)
            rescale((self.o, self.part), factors)

    def finish(self, scale: Float32 | None) -> None:
        """The last product is there, in a part of as many tiles as are left."""
        add(self.o, self.part, scale, None)


def accumulation(o: cute.Tensor, promotion: int) -> OneLevel | TwoLevels:
    """Of O, which is 0 yet. promotion: as the config's."""
    if promotion == 0:
        return OneLevel(o)
    part = cute.make_rmem_tensor_like(o)
    if promotion > 1:
        part.fill(0.0)
    return TwoLevels(o, part, promotion)


def add(o: cute.Tensor, part: cute.Tensor, scale: Float32 | None, factors: cute.Tensor | None) -> None:
    """O = (O + part * scale) * factors, row by row; without a scale, or without factors, where None."""
    o, part = rows_by_columns(o), rows_by_columns(part)
    for r in range(cute.size(o, mode=[0])):
        for c in range(cute.size(o, mode=[1])):
            added = part[r, c] + o[r, c] if scale is None else cute.math.fma(part[r, c], scale, o[r, c])
            o[r, c] = added if factors is None else added * factors[r]


@cute.jit
def rescale(sums: tuple[cute.Tensor, ...], factors: cute.Tensor):
    """Sums *= factors, row by row, unless no row of the warp has a new maximum."""
    if cute.arch.vote_any_sync((factors[0] != 1.0) | (factors[1] != 1.0)):
        for s in cutlass.range_constexpr(len(sums)):
            rows = rows_by_columns(sums[s])
            for r in cutlass.range_constexpr(cute.size(rows, mode=[0])):
                for c in cutlass.range_constexpr(cute.size(rows, mode=[1])):
                    rows[r, c] = rows[r, c] * factors[r]
