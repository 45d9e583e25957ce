"""Which query heads a tile holds: one, or several that share a KV head.

Row i of a tile is row i of its head or, with several heads in a tile (a power of two), row i // heads of head
i % heads: the heads of one KV head, side by side, fill a tile that a few rows of one of them would not.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32

from ..elementwise import minimum
from ..problem import Problem


class TileHeads(NamedTuple):
    """Query heads first <= h < end of KV head `kv`, as many as the tile has room for.

    place: where `Operand.head_rows` finds them.
    """

    first: Int32
    end: Int32
    kv: Int32
    place: Int32 | tuple[Int32, Int32]

    @staticmethod
    def of(
        problem: Problem,
        heads: int,
        index: Int32,
        group: Int32,
        by_parts: cute.FastDivmodDivisorV2 | None = None,
    ) -> TileHeads:
        """Number `index` of a launch's; `group` query heads share a KV head, `heads` of them a tile.

        by_parts: `parts_of` the two for a division, where the host has made that cheap.
        """
        parts = parts_of(heads, group) if by_parts is None else by_parts
        if heads == 1:
            return TileHeads(index, index + 1, index // parts if problem.gqa else index, index)
        kv = index // parts
        first = (index - kv * parts_of(heads, group)) * heads
        return TileHeads(kv * group + first, kv * group + group, kv, (kv, first))

    def of_row(self, heads: int, row: Int32) -> Int32:
        """The head of a tile's row; from `end` on there is none."""
        return self.first if heads == 1 else self.first + (row & (heads - 1))

    def known(self, heads: int, head: Int32) -> Int32:
        """`head`, or where there is none the last one, so that what is looked up for it exists."""
        return head if heads == 1 else minimum(head, self.end - 1)


def parts_of(heads: int, group: Int32) -> Int32:
    """Tiles that the heads of a KV head take, for the same rows."""
    return group if heads == 1 else cute.ceil_div(group, heads)


def row_of(heads: int, first_row: Int32, row: Int32) -> Int32:
    """In the sequence: a tile's row, when its first is `first_row`."""
    return first_row + (row >> (heads.bit_length() - 1))
