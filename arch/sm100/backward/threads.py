"""How a warpgroup's threads share the accumulators of keys: a key each, or two of them half of a key each.

What a key has neighbours of, rows of S or columns of dK, is a span of it: all of it, or half, is a thread's.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32

from .. import tmem
from ..tmem import HALF_LANES
from .tuning import ROWS

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

    def load(self, base: cute.Pointer, first, span: int, row: cute.Tensor, thread: Int32) -> None:
        """Read registers of a key's span: column `first` is the first thread's first."""
        tmem.load(tmem.columns(base, first, cute.size(row)), row, thread)

    def store(self, row: cute.Tensor, base: cute.Pointer, first, span: int, thread: Int32) -> None:
        """Write registers likewise."""
        tmem.store(row, tmem.columns(base, first, cute.size(row)), thread)


class KeyShared:
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


class Below:
    """64 rows, whose second half of the columns lies in the lanes below the first's; likewise."""

    def key(self, thread: Int32) -> Int32:
        return thread % (ROWS // 2)

    def part(self, thread: Int32, unit: int) -> Int32:
        return thread // (ROWS // 2) * unit


def threads_of(keys: int) -> KeyEach | KeyShared:
    """Those of a tile of 128 or 64 keys."""
    return KeyEach() if keys == ROWS else KeyShared()
