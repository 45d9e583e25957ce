"""How a warpgroup's threads share the accumulators of keys: a key each, or two of them half of a key each.

What a key has neighbours of, rows of S or columns of dK, is a span of it: all of it, or half, is a thread's.
"""

from __future__ import annotations

from collections.abc import Iterator

import cutlass.cute as cute
from cutlass import Int32

from .. import tmem
from ..group import Group
from ..tmem import HALF_LANES
from .config import ROWS

WARP = 32


class KeyEach:
    """128 keys. sharers: of a key. neighbours: keys that threads with neighbouring lanes have."""

    sharers, neighbours = 1, WARP

    def key(self, thread: Int32) -> Int32:
        """Which of the tile's is the thread's."""
        return thread

    def part(self, thread: Int32, unit: int) -> Int32 | int:
        """Where the thread's part of a span begins, whose parts are `unit`."""
        return 0

    def pieces(self, columns: int, width: int) -> Iterator[tuple[int, int]]:
        """Of columns `width` at a time: where in tensor memory, and how far the threads' are apart."""
        return ((place, width // self.sharers) for place in range(0, columns, width))

    def load(self, base: cute.Pointer, first, span: int, row: cute.Tensor, thread: Int32) -> None:
        """Read registers of a key's span: column `first` is the first thread's first."""
        tmem.load(tmem.columns(base, first, cute.size(row)), row, thread)

    def store(self, row: cute.Tensor, base: cute.Pointer, first, span: int, thread: Int32) -> None:
        """Write registers likewise."""
        tmem.store(row, tmem.columns(base, first, cute.size(row)), thread)


class KeyShared(KeyEach):
    """64 keys; likewise."""

    sharers, neighbours = 2, HALF_LANES

    def key(self, thread: Int32) -> Int32:
        return thread // WARP * HALF_LANES + thread % HALF_LANES

    def part(self, thread: Int32, unit: int) -> Int32:
        return thread // HALF_LANES % 2 * unit

    def load(self, base: cute.Pointer, first, span: int, row: cute.Tensor, thread: Int32) -> None:
        tmem.load_shared(base + first, span // 2, row, thread)

    def store(self, row: cute.Tensor, base: cute.Pointer, first, span: int, thread: Int32) -> None:
        tmem.store_shared(row, base + first, span // 2, thread)


class Below(KeyEach):
    """64 rows of a CTA of a pair: the second half of the columns lies in the lanes below the first's."""

    sharers, neighbours = 2, WARP

    def key(self, thread: Int32) -> Int32:
        return thread % (ROWS // 2)

    def part(self, thread: Int32, unit: int) -> Int32:
        return thread // (ROWS // 2) * unit

    def pieces(self, columns: int, width: int) -> Iterator[tuple[int, int]]:
        return ((place, columns // 2) for place in range(0, columns // 2, width // 2))


def threads_of(rows: int, group: Group) -> KeyEach:
    """Those of an accumulator of which a CTA has 128 or 64 rows."""
    if rows == ROWS:
        return KeyEach()
    return Below() if group.paired else KeyShared()
